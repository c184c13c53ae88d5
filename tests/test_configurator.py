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
# of these the comments demand something
share = 0.5        # >= 0, < 1: of something
most = 3.0         # <= 4: as it is
parts = [1, 2]     # > 0: each of them
mode = 'all'       # all | some | none.at-all: which
device = 'auto'    # auto | cpu | cuda | cuda:N | mps: N stands for digits
free = 'a'         # a | b, or anything
# ---------------------------------------------
'''


@pytest.fixture
def script(tmp_path):
    (tmp_path / 'other.py').write_text(SCRIPT.replace('steps', 'beams'))
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)
    return str(path)


@pytest.mark.parametrize('arguments, name, value', [
    (['--steps=7'], 'steps', 7), (['--steps', '7'], 'steps', 7), (['--steps=1e3'], 'steps', 1000),
    (['--rate=1'], 'rate', 1.0), (['--rate', '-1'], 'rate', -1.0), (['--flag=true'], 'flag', True),
    (['--flag=0'], 'flag', False), (['--flag', 'True'], 'flag', True), (['--layers=5,6'], 'layers', [5, 6]),
    (['--layers=[5, 6]'], 'layers', [5, 6]), (['--layers', '5'], 'layers', [5]), (['--words=q,v'], 'words', ['q', 'v']),
    (["--words=['q']"], 'words', ['q']), (['--name=a=b'], 'name', 'a=b'), (['--name=3'], 'name', '3'),
    (['--steps=1', '--steps=2'], 'steps', 2)])
def test_the_default_decides_the_type_of_what_the_command_line_gives(script, arguments, name, value):
    found = configurator.configure(script, arguments)[name]
    assert found == value and type(found) is type(value)


def test_a_neighbours_options_are_known_in_a_folder_of_any_name(tmp_path):
    folder = tmp_path / 'copy [1]'
    folder.mkdir()
    for name, text in (('script.py', SCRIPT), ('other.py', SCRIPT.replace('steps', 'beams')), ('c.py', 'beams = 3')):
        (folder / name).write_text(text)
    assert configurator.configure(str(folder / 'script.py'), [str(folder / 'c.py')])['steps'] == 150


@pytest.mark.parametrize('text, name, value', [
    ('steps = 1e3', 'steps', 1000), ('rate = 1', 'rate', 1.0), ('flag = 1', 'flag', True),
    ('layers = range(3)', 'layers', [0, 1, 2]), ('import math\n_x = 2\nsteps = _x * 3', 'steps', 6),
    ('beams = 3', 'steps', 150)])
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
    (['--setps=3'], ['setps', 'did you mean steps']), (['--steps=x'], ['--steps=x', 'whole number']),
    (['--steps=1.5'], ['whole number']), (['--rate=nan'], ['a number']), (['--flag=maybe'], ['True or False']),
    (['--layers=5,x'], ['list of int']), (['--steps'], ['no value']), (['steps=3'], ['no config file (*.py) steps=3']),
    (['--flag', '--steps=3'], ['--flag has no value']), (['none.py'], ['no config file']), (['--beams=3'], ['beams']),
    (['--xyz=1'], ['--help'])])
def test_a_mistake_on_the_command_line_is_one_line_and_status_2(script, capsys, arguments, words):
    with pytest.raises(SystemExit) as e:
        configurator.configure(script, arguments)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1 and all(word in err for word in words), err


@pytest.mark.parametrize('text, words', [
    ('max = 1', ['max', 'c.py']), ('steps = "7"', ['steps', 'whole number']), ('steps = True', ['whole number']),
    ('layers = 5', ['list of int']), ('layers = [1, "a"]', ['list of int']), ('name = 3', ['a text']),
    ('choice = True', ['a text']), ('x = (', ['line 1', 'SyntaxError']), ('\nx = 1 / 0', ['line 2', 'ZeroDivision']), ('\nexit()', ['SystemExit']),
    ('share = 2', ['share=2.0 found, at least 0 and below 1 wanted'])])
def test_a_mistake_in_a_config_file_is_one_line_and_status_2(script, tmp_path, capsys, text, words):
    (tmp_path / 'c.py').write_text(text)
    with pytest.raises(SystemExit) as e:
        configurator.configure(script, [str(tmp_path / 'c.py')])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1 and all(word in err for word in words), err


@pytest.mark.parametrize('argument, line', [
    ('--share=-0.1', 'share=-0.1 found, at least 0 and below 1 wanted'),
    ('--share=1', 'share=1.0 found, at least 0 and below 1 wanted'), ('--most=4.5', 'most=4.5 found, at most 4 wanted'),
    ('--parts=1,0', 'parts: 0 found, more than 0 wanted'), ('--device=', 'device= found'),
    ('--mode=both', 'mode=both found, all, some or none.at-all wanted'), ('--mode=none_at-all', 'none.at-all wanted'),
    ('--device=cuda:x', 'device=cuda:x found, auto, cpu, cuda, cuda:N or mps wanted')])
def test_a_value_that_its_options_comment_excludes_is_one_line_and_status_2(script, capsys, argument, line):
    with pytest.raises(SystemExit) as e:
        configurator.configure(script, [argument])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith('error: ') and line in err and err.count('\n') == 1


@pytest.mark.parametrize('argument, value', [
    ('--share=0', 0.0), ('--most=4', 4.0), ('--parts=', []), ('--parts=3,4', [3, 4]),
    ('--mode=none.at-all', 'none.at-all'), ('--device=cuda:12', 'cuda:12'), ('--device=mps', 'mps'), ('--free=x', 'x')])
def test_what_a_comment_allows_is_taken_and_a_comment_without_a_colon_demands_nothing(script, argument, value):
    assert configurator.configure(script, [argument])[argument[2:].partition('=')[0]] == value


def test_help_prints_every_option_with_its_current_value_and_comment(script, capsys):
    with pytest.raises(SystemExit) as e:
        configurator.configure(script, ['--steps=3', '--help'])
    out = capsys.readouterr().out
    assert e.value.code == 0
    assert all(text in out for text in ('What it does.', 'numbers', '--layers=[10, 20]', 'a switch'))
    assert any('--steps=3' in line and 'how many' in line for line in out.splitlines()) and '>= 0, < 1: of some' in out


def test_help_ends_in_silence_where_nobody_reads_on(script, capsys, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, 'Broken pipe')
    monkeypatch.setattr(sys, 'stdout', Closed())
    with pytest.raises(SystemExit) as end:
        configurator.configure(script, ['--help'])
    assert end.value.code == 0 and capsys.readouterr().err == ''


def test_of_several_ranks_the_first_that_ends_speaks_and_a_fault_names_its_rank(tmp_path, monkeypatch, capsys):
    for rank in '102':
        monkeypatch.setenv('RANK', rank)
        monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(tmp_path / rank / 'error.json'))
        monkeypatch.setattr('sys.__stderr__', sys.stderr)
        configurator.fault(RuntimeError, RuntimeError('[gloo/transport/tcp/pair.cc:1] Connection closed by peer'), None)
    err = capsys.readouterr().err
    assert err.startswith('fault: rank 1: lost another rank') and err.count('\n') == 1


@pytest.mark.parametrize('error, words', [
    (OSError(28, 'No space left on device'), 'the disk is full'), (OSError(5, 'Input/output error'), 'the disk failed'),
    (type('OutOfMemoryError', (RuntimeError,), {})('x'), 'lower micro_batch_tokens'),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 'lower micro_batch_tokens'),
    (RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'), 'lower micro_batch_tokens'),
    (KeyboardInterrupt(), 'interrupted')])
def test_what_the_machine_does_is_one_line_and_a_bug_is_a_traceback(capsys, error, words):
    configurator.fault(type(error), error, None)
    err = capsys.readouterr().err
    assert words in err and err.count('\n') == 1
    configurator.fault(KeyError, KeyError('x'), None)
    assert 'KeyError' in capsys.readouterr().err


# ---- output folders ----


def a_folder(path, *names):
    """A new folder that holds files of these names."""
    path.mkdir()
    for name in names:
        (path / name).write_text('mine')


@pytest.mark.parametrize('found, options, words', [
    ({'out': ['ours']}, {}, ['x: ', 'out is there already; choose another', 'add --overwrite=True']),
    ({'out': ['thesis']}, {'overwrite': True, 'resume': True}, ['out is there already; choose another']),
    ({'out': ['ours'], 'out.partial': ['ours']}, {'resume': True}, ['out is there already']),
    ({'out.partial': ['ours']}, {}, ['out.partial is there already', 'overwrite']),
    ({'out.partial': ['ours', 'checkpoint.pt']}, {}, ['to replace it, or --resume=True to go on']),
    ({'out.partial': ['thesis']}, {'overwrite': True, 'resume': True}, ['out.partial is there already']),
    ({'out.old': ['thesis']}, {'overwrite': True, 'resume': True}, ['out.old is there already'])])
def test_an_output_folder_that_may_not_be_replaced_is_one_line_and_left_alone(tmp_path, capsys, found, options, words):
    for name, files in found.items():
        a_folder(tmp_path / name, *files)
    with pytest.raises(SystemExit) as e:
        configurator.check_output('x', str(tmp_path / 'out'), ['ours', 'ours, too'], **{'overwrite': False, **options})
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1 and all(word in err for word in words), err
    assert ('--overwrite' in err) == ('thesis' not in sum(found.values(), []))
    assert {name: sorted(file.name for file in (tmp_path / name).iterdir()) for name in found} == \
        {name: sorted(files) for name, files in found.items()}


@pytest.mark.parametrize('found, options', [
    ({}, {}), ({'out': [], 'out.partial': [], 'out.old': []}, {}),
    ({'out': ['ours'], 'out.partial': ['ours']}, {'overwrite': True}),
    ({'out.partial': ['ours']}, {'resume': True}), ({'out.old': ['ours']}, {})])
def test_an_empty_folder_one_of_our_own_and_a_new_one_in_new_folders_may_be_written(tmp_path, found, options):
    for name, files in found.items():
        a_folder(tmp_path / name, *files)
    configurator.check_output('x', str(tmp_path / 'out'), ['ours'], **{'overwrite': False, **options})
    configurator.check_output('x', str(tmp_path / 'new' / 'deep' / 'out'), ['ours'], False)


def test_an_output_in_a_file_or_in_place_of_one_is_one_line(tmp_path, capsys):
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
    wanted = {'file/out': 'no folder that can be written', 'file': 'is there already', 'link': 'is there already'}
    for name, words in wanted.items():
        with pytest.raises(SystemExit):
            configurator.check_output('x', str(tmp_path / name), ['ours'], True, True)
        assert words in capsys.readouterr().err
    for name in ('.', '..', '/'):
        with pytest.raises(SystemExit):
            configurator.check_output('x', name, ['ours'], True, True)
        assert 'the name of a new folder wanted' in capsys.readouterr().err


def test_a_complete_folder_takes_the_place_of_the_one_that_was_there(tmp_path):
    for name in ('out.partial', 'out', 'out.old'):
        a_folder(tmp_path / name, name)
    configurator.publish(str(tmp_path / 'out.partial'), str(tmp_path / 'out'))
    assert [path.name for path in tmp_path.iterdir()] == ['out'] and (tmp_path / 'out' / 'out.partial').exists()
    a_folder(tmp_path / 'more')
    configurator.publish(str(tmp_path / 'more'), str(tmp_path / 'fresh'))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['fresh', 'out']


# ---- whatever the command line and a config file hold ----

OPTIONS = 'steps rate flag name choice layers words share most parts mode device free'.split()
NAME = st.one_of(st.sampled_from([*OPTIONS, 'help', 'beams', 'stepz']), st.text(max_size=6))
TEXT = st.one_of(st.text(max_size=12), st.sampled_from([
    '1e3', '-1', '1e999', 'nan', '9' * 5000, '[5,6]', '[', '5,,6', 'True', 'none', '', '--rate', 'a=b', '0.5', 'cpu']))
GIVEN = st.tuples(NAME, TEXT).map(lambda pair: f'--{pair[0]}={pair[1]}')
ARGUMENT = st.one_of(GIVEN, NAME.map(lambda name: f'--{name}'), TEXT,
                     st.sampled_from(['c.py', 'c \u00e9.py', '--help']))
VALUE = st.one_of(TEXT, st.integers().map(repr), st.lists(st.integers(), max_size=3).map(repr))
LINE = st.one_of(st.tuples(NAME, VALUE).map(' = '.join), st.text(max_size=20))


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(arguments=st.lists(ARGUMENT, max_size=4), lines=st.lists(LINE, max_size=3))
def test_any_command_line_and_config_file_is_options_or_one_line_and_status_2(tmp_path_factory, arguments, lines):
    folder = tmp_path_factory.getbasetemp() / 'any'
    folder.mkdir(exist_ok=True)
    (folder / 'script.py').write_text(SCRIPT)
    for name in ('c.py', 'c \u00e9.py'):
        (folder / name).write_text('\n'.join(lines))
    is_file = lambda argument: argument.endswith('.py') and not argument.startswith('--')
    arguments = [str(folder / argument) if is_file(argument) else argument for argument in arguments]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            config = configurator.configure(str(folder / 'script.py'), arguments)
    except SystemExit as e:
        one_line = e.code == 2 and err.getvalue().count('\n') == 1
        assert one_line or (e.code == 0 and 'What it does.' in out.getvalue()), err.getvalue()
    else:
        assert list(config) == OPTIONS and type(config['steps']) is int and type(config['rate']) is float
        assert 0 <= config['share'] < 1 and config['most'] <= 4 and all(part > 0 for part in config['parts'])
