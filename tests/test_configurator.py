import contextlib
import io
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import configurator

SCRIPT = '''"""What it does."""
# ---------------------------------------------
# numbers
steps = 150        # how many
rate = 1e-4
flag = False       # a switch
name = 'a'
choice = 'auto'
layers = [10, 20]  # which
words = ['q', 'k']
# ---------------------------------------------
'''


@pytest.fixture
def script(tmp_path):
    (tmp_path / 'other.py').write_text(SCRIPT.replace('steps', 'beams'))
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)
    return str(path)


@pytest.mark.parametrize('arguments, name, value', [
    (['--steps=7'], 'steps', 7), (['--steps', '7'], 'steps', 7), (['--steps=1e3'], 'steps', 1000), (['--rate=1'], 'rate', 1.0),
    (['--rate', '-1'], 'rate', -1.0), (['--flag=true'], 'flag', True), (['--flag=0'], 'flag', False), (['--flag', 'True'], 'flag', True),
    (['--layers=5,6'], 'layers', [5, 6]), (['--layers=[5, 6]'], 'layers', [5, 6]), (['--layers', '5'], 'layers', [5]),
    (['--words=q,v'], 'words', ['q', 'v']), (["--words=['q']"], 'words', ['q']), (['--name=a=b'], 'name', 'a=b'), (['--name=3'], 'name', '3'),
    (['--steps=1', '--steps=2'], 'steps', 2)])
def test_the_default_decides_the_type_of_what_the_command_line_gives(script, arguments, name, value):
    found = configurator.configure(script, arguments)[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize('text, name, value', [
    ('steps = 1e3', 'steps', 1000), ('rate = 1', 'rate', 1.0), ('flag = 1', 'flag', True), ('layers = range(3)', 'layers', [0, 1, 2]),
    ('choice = True', 'choice', 'True'), ('import math\n_x = 2\nsteps = _x * 3', 'steps', 6), ('beams = 3', 'steps', 150)])
def test_a_config_file_is_python_and_may_set_options_of_a_neighbour_script(script, tmp_path, text, name, value):
    (tmp_path / 'c.py').write_text(text)
    found = configurator.configure(script, [str(tmp_path / 'c.py')])[name]
    assert found == value and type(found) is type(value)


def test_later_files_win_and_the_command_line_wins_over_all(script, tmp_path):
    (tmp_path / 'a.py').write_text("steps = 1\nname = 'a1'\nrate = 0.5")
    (tmp_path / 'b.py').write_text("steps = 2\nname = 'b2'")
    config = configurator.configure(script, ['--steps=3', str(tmp_path / 'a.py'), str(tmp_path / 'b.py')])
    assert (config['steps'], config['name'], config['rate'], config['layers']) == (3, 'b2', 0.5, [10, 20])


@pytest.mark.parametrize('arguments, words', [
    (['--setps=3'], ['setps', 'did you mean steps']), (['--steps=x'], ['--steps=x', 'whole number']), (['--steps=1.5'], ['whole number']),
    (['--rate=nan'], ['a number']), (['--flag=maybe'], ['True or False']), (['--layers=5,x'], ['list of int']), (['--steps'], ['no value']),
    (['--flag', '--steps=3'], ['--flag has no value']), (['steps=3'], ['neither']), (['none.py'], ['no config file']), (['--beams=3'], ['beams'])])
def test_a_mistake_on_the_command_line_is_one_line_and_status_2(script, capsys, arguments, words):
    with pytest.raises(SystemExit) as e:
        configurator.configure(script, arguments)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1 and all(word in err for word in words), err


@pytest.mark.parametrize('text, words', [
    ('max = 1', ['max', 'c.py']), ('steps = "7"', ['steps', 'whole number']), ('steps = True', ['whole number']), ('layers = 5', ['list of int']),
    ('layers = [1, "a"]', ['list of int']), ('name = 3', ['a text']), ('x = (', ['line 1', 'SyntaxError']), ('\nx = 1 / 0', ['line 2', 'ZeroDivision'])])
def test_a_mistake_in_a_config_file_is_one_line_and_status_2(script, tmp_path, capsys, text, words):
    (tmp_path / 'c.py').write_text(text)
    with pytest.raises(SystemExit) as e:
        configurator.configure(script, [str(tmp_path / 'c.py')])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1 and all(word in err for word in words), err


def test_help_prints_every_option_with_its_current_value_and_comment(script, capsys):
    with pytest.raises(SystemExit) as e:
        configurator.configure(script, ['--steps=3', '--help'])
    out = capsys.readouterr().out
    assert e.value.code == 0 and 'What it does.' in out and 'numbers' in out and '--layers=[10, 20]' in out and 'a switch' in out
    assert any('--steps=3' in line and 'how many' in line for line in out.splitlines())


def test_of_several_ranks_the_first_that_ends_has_the_last_word_and_a_fault_names_its_rank(tmp_path, monkeypatch, capsys):
    for rank in '102':
        monkeypatch.setenv('RANK', rank)
        monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(tmp_path / rank / 'error.json'))
        monkeypatch.setattr('sys.__stderr__', sys.stderr)
        configurator.fault(RuntimeError, RuntimeError('[gloo/transport/tcp/pair.cc:1] Connection closed by peer'), None)
    err = capsys.readouterr().err
    assert err.startswith('fault: rank 1: lost another rank') and err.count('\n') == 1


@pytest.mark.parametrize('error, words', [
    (OSError(28, 'No space left on device'), 'the disk is full'), (type('OutOfMemoryError', (RuntimeError,), {})('x'), 'lower micro_batch_tokens'),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 'lower micro_batch_tokens'), (OSError(5, 'Input/output error'), 'the disk failed'),
    (KeyboardInterrupt(), 'interrupted')])
def test_what_the_machine_does_is_one_line_and_a_bug_is_a_traceback(capsys, error, words):
    configurator.fault(type(error), error, None)
    err = capsys.readouterr().err
    assert words in err and err.count('\n') == 1
    configurator.fault(KeyError, KeyError('x'), None)
    assert 'KeyError' in capsys.readouterr().err


NAME = st.one_of(st.sampled_from(['steps', 'rate', 'flag', 'name', 'layers', 'words', 'help', 'beams', 'stepz']), st.text(max_size=6))
TEXT = st.one_of(st.text(max_size=12), st.sampled_from(['1e3', '-1', '1e999', 'nan', '9' * 5000, '[5,6]', '[', '5,,6', 'True', 'none', '', '--rate', 'a=b']))
ARGUMENT = st.one_of(st.tuples(NAME, TEXT).map(lambda pair: f'--{pair[0]}={pair[1]}'), NAME.map(lambda name: f'--{name}'), TEXT,
                     st.sampled_from(['c.py', 'c \u00e9.py', '--help']))
LINE = st.one_of(st.tuples(NAME, st.one_of(TEXT, st.integers().map(repr), st.lists(st.integers(), max_size=3).map(repr))).map(' = '.join), st.text(max_size=20))


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(arguments=st.lists(ARGUMENT, max_size=4), lines=st.lists(LINE, max_size=3))
def test_any_command_line_and_config_file_is_options_or_one_line_and_status_2(tmp_path_factory, arguments, lines):
    folder = tmp_path_factory.getbasetemp() / 'any'
    folder.mkdir(exist_ok=True)
    (folder / 'script.py').write_text(SCRIPT)
    for name in ('c.py', 'c \u00e9.py'):
        (folder / name).write_text('\n'.join(lines))
    arguments = [str(folder / argument) if argument.endswith('.py') and not argument.startswith('--') else argument for argument in arguments]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            config = configurator.configure(str(folder / 'script.py'), arguments)
    except SystemExit as e:
        assert (e.code == 2 and err.getvalue().count('\n') == 1) or (e.code == 0 and 'What it does.' in out.getvalue()), err.getvalue()
    else:
        assert list(config) == ['steps', 'rate', 'flag', 'name', 'choice', 'layers', 'words'] and type(config['steps']) is int and type(config['rate']) is float
