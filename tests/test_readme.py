"""What the README says of the scripts is so: its commands and options, the lines it points to, the example of a change."""
import glob
import os
import re
import shlex
import types

import pytest
from conftest import ROOT

import cb_train
import configurator

README = open(os.path.join(ROOT, 'README.md'), encoding='utf-8').read()
CONFIGS = sorted(glob.glob(os.path.join(ROOT, 'config', '*.py')))


def commands():
    """The README's commands, without comments."""
    lines = [line for block in re.findall(r'```sh\n(.*?)```', README.replace('\\\n', ' '), re.S) for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.partition('#')[0].split('&&')]
    return sorted({part for part in parts if part.startswith(('python ', 'torchrun '))})


@pytest.mark.parametrize('command', [c for c in commands() if not c.startswith(('python -m', 'python tests/'))])
def test_every_command_of_the_readme_names_scripts_configs_and_options_that_exist(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, *arguments = [word for word in shlex.split(command)[1:] if not word.startswith('--nproc_per_node')]
    if script == 'data_prep.py':  # its first word is the command
        job, *arguments = arguments
        assert job in ('toy', 'kitchen', 'check') or os.path.isfile(f'config/{job}.py')
        arguments = arguments[job == 'check':]
    assert configurator.configure(script, arguments)


@pytest.mark.parametrize('path', CONFIGS)
def test_every_config_is_read_by_every_script_and_fits_its_checks(path):
    for script in ('cb_train.py', 'cb_eval.py', 'data_prep.py'):
        config = configurator.configure(os.path.join(ROOT, script), [path])
        if script == 'cb_train.py':
            cb_train.check_options(types.SimpleNamespace(**config | {'fsdp': False}, rank=0, world=1))


def test_the_readme_holds_no_place_that_waits_for_a_figure_and_is_short():
    prose = re.sub(r'```diff\n.*?```', '', README, flags=re.S)  # a diff has hunks that begin with @@
    assert '@@' not in prose and 'TODO' not in README
    assert README.count('\n') <= 250 and len(README.encode()) <= 18 * 1024


def test_the_lines_that_the_readme_sends_a_reader_to_are_those_of_the_sections():
    source = open(os.path.join(ROOT, 'cb_train.py'), encoding='utf-8').read().split('\n')
    rows = re.findall(r'^\| \d+ \| (\d+)-(\d+) \| ([^|]+?) \|', README, re.M)
    assert len(rows) >= 5
    for first, last, name in rows:
        assert source[int(first) - 1].startswith('# ---- ') and name.split(':')[0] in source[int(first) - 1], (first, name)
        assert int(last) > int(first) and source[int(last)].startswith(('# ---- ', '# ====')), (last, name)


def test_the_change_that_the_readme_shows_is_the_one_that_the_tests_apply():
    shown = re.search(r'```diff\n(.*?)```', README, re.S)[1]
    kept = open(os.path.join(ROOT, 'tests', 'variants', 'benign_mean.diff'), encoding='utf-8').read()
    changed = lambda text: [line for line in text.split('\n') if line[:1] in '+-' and not line.startswith(('+++', '---')) and line]
    assert changed(shown) == changed(kept)


def test_the_functions_that_the_readme_shows_are_those_of_the_script():
    shown = re.search(r'```python\n(def in_contexts.*?)\n```', README, re.S)[1]
    source = open(os.path.join(ROOT, 'data_prep.py'), encoding='utf-8').read()
    bodies = re.split(r'^def [^\n]*\n|\n+def [^\n]*\n', shown)[1:]
    assert len(bodies) == 3 and all(body in source for body in bodies)
    assert shown.count('\n') + 1 <= 40
