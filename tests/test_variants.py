"""Three experiments as a reader makes them: cb_train.py is copied, a small diff applied, and the copy run."""
import json
import os
import re
import runpy

import pytest
import torch
from conftest import ROOT

VARIANTS = os.path.join(ROOT, 'tests', 'variants')
TINY = ['--target_layers=2', '--lora_r=4', '--max_steps=4', '--batch_size=3', '--learning_rate=3e-3', '--log_interval=1']


def variant(name, folder):
    """Writes cb_train.py with tests/variants/NAME.diff applied into a folder. Returns how many lines the diff changes."""
    source = open(os.path.join(ROOT, 'cb_train.py')).read()
    diff = open(os.path.join(VARIANTS, f'{name}.diff')).read()
    hunks = [hunk.split('\n')[1:] for hunk in re.split(r'^@@', diff, flags=re.M)[1:]]
    hunks = [[line for line in hunk if line] for hunk in hunks]
    for hunk in hunks:
        before = ''.join(line[1:] + '\n' for line in hunk if line[0] in ' -')
        after = ''.join(line[1:] + '\n' for line in hunk if line[0] in ' +')
        assert source.count(before) == 1, before
        source = source.replace(before, after)
    (folder / 'cb_train.py').write_text(source)
    return sum(line[0] in '+-' for hunk in hunks for line in hunk)


@pytest.fixture
def trained(run, model_dir, rows, tmp_path):
    """trained(name, *more options): a variant's log and its count of changed lines; a variant '' is the script as it is."""
    def go(name, *more):
        folder = tmp_path / (name or 'plain')
        folder.mkdir()
        changed = variant(name, folder) if name else 0
        script = os.path.join(folder if name else ROOT, 'cb_train.py')
        given = {'model_name': model_dir, 'cb_data_path': rows['cb'], 'retain_data_path': rows['retain'],
                 'val_data_path': rows['val'], 'output_dir': folder / 'out'}
        status, _, err = run(script, *[f'--{option}={value}' for option, value in given.items()], *TINY, *more)
        assert status == 0, err
        return [json.loads(line) for line in open(folder / 'out' / 'log.jsonl')], changed
    return go


def test_a_cb_loss_towards_the_mean_benign_state_is_what_a_hand_computes_and_moves_states_there(trained, tmp_path):
    log, changed = trained('benign_mean', '--use_dynamic_scheduling=False')
    assert changed <= 15
    assert log[-1]['cb_loss'] < log[0]['cb_loss']
    functions = runpy.run_path(str(tmp_path / 'benign_mean' / 'cb_train.py'))
    benign, mask = torch.tensor([[[3.0, 0.0], [1.0, 0.0], [9.0, 9.0]]]), torch.tensor([[1.0, 1.0, 0.0]])
    functions['retain_loss']([benign], [benign], mask, [0])
    h_lora = torch.tensor([[[2.0, 0.0], [0.0, 5.0], [7.0, 7.0]]])
    assert functions['rerouting_loss']([benign], [h_lora], mask, [0]).item() == pytest.approx(0 + 1)


def test_a_third_stream_has_figures_of_its_own_in_the_log_and_weighs_in_twice(trained, rows):
    log, changed = trained('third_stream', f'--refusal_data_path={rows["retain"]}')
    assert changed <= 15
    for record in log:
        assert record['refusals_coeff'] == pytest.approx(2 * record['retain_coeff']) and record['refusals_loss'] > 0
        parts = [record[f'{prefix}_coeff'] * record[f'{prefix}_loss'] for prefix in ('retain', 'cb', 'refusals')]
        assert record['loss'] == pytest.approx(sum(parts))
    assert log[-1]['val_refusals_cos'] != log[-1]['val_retain_cos']  # on a tenth of its own rows, not on the benign ones


def test_a_mask_without_the_templates_head_counts_fewer_retain_tokens_and_as_many_harmful_ones(trained):
    plain, _ = trained('')
    log, changed = trained('no_head')
    assert changed <= 15
    heads = 2 * 3  # <bos> <user> in front of each of three retain rows
    assert [b['tokens'] - a['tokens'] for a, b in zip(log, plain)] == [heads * step for step in (1, 2, 3, 4)]
