"""The README's commands and the options it names are those that the scripts know."""
import glob
import os
import re
import shlex

import pytest
from conftest import ROOT

import configurator

README = open(os.path.join(ROOT, 'README.md'), encoding='utf-8').read()
COMMANDS = sorted({command.partition('#')[0].strip() for block in re.findall(r'```sh\n(.*?)```', README.replace('\\\n', ' '), re.S)
                   for line in block.splitlines() for command in line.partition('#')[0].split('&&') if command.strip().startswith(('python ', 'torchrun '))})


@pytest.mark.parametrize('command', [c for c in COMMANDS if not c.startswith(('python -m', 'python tests/'))])
def test_every_command_of_the_readme_names_scripts_configs_and_options_that_exist(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, *arguments = [word for word in shlex.split(command.replace('$s', '0'))[1:] if not word.startswith('--nproc_per_node')]
    if script == 'data_prep.py':  # its first word is the job
        job, *arguments = arguments
        assert job in ('toy', 'sample', 'check', 'boundary') or os.path.isfile(f'config/{job}.py')
        arguments = arguments[job == 'check':]
    assert configurator.configure(script, arguments)


@pytest.mark.parametrize('path', sorted(glob.glob(os.path.join(ROOT, 'config', '*.py'))))
def test_every_config_is_read_by_every_script_and_fits_its_checks(path):
    import cb_train
    for script in ('cb_train.py', 'cb_eval.py', 'data_prep.py'):
        config = configurator.configure(os.path.join(ROOT, script), [path])
        if script == 'cb_train.py':
            cb_train.check_options({**config, 'output_dir': 'none'})


def test_the_readme_holds_no_place_that_waits_for_a_figure():
    assert not re.findall(r'^[A-Z]+(?:_[A-Z]+)*$|\b[A-Z]{3,}_[A-Z]{3,}\b', README, re.M)


def test_the_readme_shows_the_options_of_cb_train_as_they_are():
    fenced = configurator.FENCE.search(open(os.path.join(ROOT, 'cb_train.py'), encoding='utf-8').read())[1]
    assert fenced in README
