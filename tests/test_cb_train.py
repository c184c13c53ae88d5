import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import make_model_dir
from safetensors.torch import load_file

import cb_train

TINY = ['--target_layers=2', '--num_hidden_layers=3', '--layers_to_transform=0,1,2', '--lora_r=4', '--lora_alpha=8', '--max_steps=4',
        '--batch_size=3', '--learning_rate=0.01', '--log_interval=1', '--eval_interval=2', '--device=cpu', '--dtype=auto']


@pytest.fixture
def arguments(model_dir, rows, tmp_path):
    return [f'--model_name={model_dir}', f'--cb_data_path={rows["cb"]}', f'--retain_data_path={rows["retain"]}',
            f'--val_data_path={rows["val"]}', f'--output_dir={tmp_path / "out"}', *TINY]


@pytest.fixture
def adapted(model_dir):
    """Three blocks of the tiny model with a LoRA whose B is not zero, and a ragged batch: model, {name: LoRA}, ids, mask."""
    model = cb_train.load_decoder(model_dir, 3, 'float32', 'cpu')
    loras = cb_train.add_lora(model, ['q_proj', 'k_proj', 'v_proj', 'o_proj'], [0, 1, 2], 4, 8, 0.0)
    torch.manual_seed(1)
    for lora in loras.values():
        torch.nn.init.normal_(lora.lora_B, std=0.2)
    ids, mask = cb_train.collate([[2, 4, 7, 8, 9, 3], [2, 4, 11, 3], [2, 12]], 'cpu')
    return model, loras, ids, mask


def losses_and_gradients(model, loras, ids, mask, **more):
    retain, _ = cb_train.retain_pass(model, ids, mask, loras.values(), [2], **more)
    cb, _ = cb_train.cb_pass(model, ids, mask, loras.values(), [2], **more)
    parameters = [p for lora in loras.values() for p in (lora.lora_A, lora.lora_B)]
    return retain, cb, torch.autograd.grad(3 * retain / mask.sum() + 7 * cb / mask.sum(), parameters)


def close(a, b, relative):
    return (a - b).norm() <= relative * b.norm()


def test_one_steps_losses_and_gradients_equal_those_of_peft(adapted, model_dir):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel
    model, loras, ids, mask = adapted
    retain, cb, gradients = losses_and_gradients(model, loras, ids, mask)
    config, _ = cb_train.truncated_config(model_dir, 3)
    twin = get_peft_model(AutoModel.from_pretrained(model_dir, config=config), LoraConfig(
        r=4, lora_alpha=8, target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj'], lora_dropout=0.0))
    named = dict(twin.named_parameters())
    theirs = [named[f'base_model.model.{name}.{part}.default.weight'] for name in loras for part in ('lora_A', 'lora_B')]
    for p, lora_p in zip(theirs, [p for lora in loras.values() for p in (lora.lora_A, lora.lora_B)]):
        p.data.copy_(lora_p.data)
    inputs = dict(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True, use_cache=False)
    with torch.no_grad(), twin.disable_adapter():
        h = torch.stack(twin(**inputs).hidden_states)
    h_lora = torch.stack(twin(**inputs).hidden_states)  # (L + 1, B, T, D)
    real = mask.bool()
    want_retain = (h_lora[1:] - h[1:]).norm(dim=-1)[:, real].mean()
    want_cb = torch.cosine_similarity(h_lora[2], h[2], dim=-1)[real].relu().mean()
    want = torch.autograd.grad(3 * want_retain + 7 * want_cb, theirs)
    assert close(retain / mask.sum(), want_retain, 1e-5) and close(cb / mask.sum(), want_cb, 1e-5) and want_cb < 0.99
    for ours, peft in zip(gradients, want):
        assert peft.norm() > 0 and close(ours, peft, 1e-5)


def test_pad_columns_change_no_loss_and_no_gradient(adapted):
    model, loras, ids, mask = adapted
    plain = losses_and_gradients(model, loras, ids, mask)
    padded = losses_and_gradients(model, loras, torch.cat([ids, torch.full((3, 5), 9)], 1), torch.cat([mask, torch.zeros(3, 5)], 1))
    assert close(padded[0], plain[0], 1e-6) and close(padded[1], plain[1], 1e-6)
    assert close(*(torch.cat([g.flatten() for g in found[2]]) for found in (padded, plain)), 1e-6)


def test_block_checkpointing_changes_no_gradient(adapted):
    model, loras, ids, mask = adapted
    plain, saved = (losses_and_gradients(model, loras, ids, mask, checkpointing=c)[2] for c in (False, True))
    assert all(close(a, b, 1e-6) for a, b in zip(saved, plain))


def test_with_the_adapter_off_the_streams_are_the_librarys_hidden_states_bit_for_bit(adapted, model_dir):
    from transformers import AutoModelForCausalLM
    model, loras, ids, mask = adapted
    whole = AutoModelForCausalLM.from_pretrained(model_dir)
    want = whole(ids, output_hidden_states=True).hidden_states
    for l, h, h_lora in cb_train.streams(model, ids, loras.values(), 3):
        assert not torch.equal(h, h_lora)
        assert torch.equal(h, want[l]) if l < 3 else torch.equal(h, whole.model.norm(want[3]))
    assert all(lora.enabled for lora in loras.values())


def test_the_losses_are_what_a_hand_computes():
    h, h_lora = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [5.0, 5.0]]]), torch.tensor([[[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]]])
    assert cb_train.distance(h, h_lora, torch.tensor([[1.0, 1.0, 0.0]])).item() == pytest.approx(6.0)
    found = cb_train.cosine(h, torch.tensor([[[4.0, 3.0], [-2.0, 0.0], [1.0, 1.0]]]), torch.tensor([[1.0, 1.0, 0.0]]))
    assert found[0].tolist() == pytest.approx([24 / 25, -1.0, 0.0])
    same = torch.ones(1, 1, 2, requires_grad=True)
    assert torch.autograd.grad(cb_train.distance(torch.ones(1, 1, 2), same, torch.ones(1, 1)), same)[0].tolist() == [[[0.0, 0.0]]]


@pytest.mark.parametrize('step, ticks, want', [(0, 150, (0, 10)), (75, 150, (5, 5)), (150, 300, (5, 5)), (200, 150, (10, 0)), (7, 0, (10, 10))])
def test_the_schedule_moves_the_weight_from_cb_to_retain(step, ticks, want):
    assert cb_train.coefficients(step, 10.0, ticks) == pytest.approx(want)


def test_every_row_is_drawn_once_an_epoch_and_any_step_can_be_asked_for():
    drawn = [row for step in range(6) for row in cb_train.batch_at(list(range(12)), step, 4, 's')]
    assert sorted(drawn[:12]) == sorted(drawn[12:]) == list(range(12)) and drawn[:12] != drawn[12:]
    assert cb_train.batch_at(list(range(5)), 1, 4, 's') == [cb_train.batch_at(list(range(5)), 4 + i, 1, 's')[0] for i in range(4)]


def test_a_run_writes_an_ordinary_model_equal_to_base_plus_peft_adapter_and_touches_nothing_else(run, arguments, model_dir, tmp_path):
    out = tmp_path / 'out'
    status, text, err = run('cb_train.py', *arguments, '--val_data_path=' + arguments[3].split('=')[1])
    assert status == 0, err
    code = '''
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import PeftModel
base, out, ids = sys.argv[1], sys.argv[2], torch.tensor([[2, 4, 7, 8, 9, 3, 5, 10]])
merged = AutoModelForCausalLM.from_pretrained(out)(ids).logits
plain = AutoModelForCausalLM.from_pretrained(base)
before = plain(ids).logits
twin = PeftModel.from_pretrained(plain, out + '/adapter')(ids).logits
AutoTokenizer.from_pretrained(out).apply_chat_template([{'role': 'user', 'content': 'yes'}])
print((merged - twin).abs().max().item(), (merged - before).abs().max().item())
'''
    done = subprocess.run([sys.executable, '-c', code, model_dir, str(out)], capture_output=True, text=True, check=True)
    to_twin, to_base = map(float, done.stdout.split())
    assert to_twin < 1e-4 < 1e-2 < to_base
    assert not os.path.exists(f'{out}.partial') and json.load(open(out / 'config.json'))['num_hidden_layers'] == 4
    changed = set()
    for name in os.listdir(model_dir):
        if name.endswith('.safetensors'):
            a, b = load_file(f'{model_dir}/{name}'), load_file(out / name)
            changed |= {key for key in a if not torch.equal(a[key], b[key])}
        else:
            assert open(f'{model_dir}/{name}', 'rb').read() == open(out / name, 'rb').read()
    assert changed == {f'model.layers.{i}.self_attn.{p}_proj.weight' for i in range(3) for p in 'qkvo'}
    records = [json.loads(line) for line in open(out / 'log.jsonl')]
    assert [r['step'] for r in records] == [0, 1, 2, 3] and records[0]['retain_loss'] == 0 and records[0]['cb_loss'] == pytest.approx(1, abs=1e-5)
    assert set(records[1]) == {'step', 'loss', 'retain_loss', 'cb_loss', 'retain_coeff', 'cb_coeff', 'retain_cos', 'cb_cos', 'learning_rate',
                               'grad_norm', 'seconds', 'tokens'}
    assert {'val_retain_loss', 'val_cb_loss', 'val_retain_cos', 'val_cb_cos'} <= set(records[2]) and records[3]['cb_cos'] < 1
    saved = json.load(open(out / 'cb_config.json'))
    assert saved['target_layers'] == [2] and saved['versions']['torch'] == torch.__version__
    status, _, err = run('cb_train.py', *arguments)
    assert status == 2 and 'overwrite' in err
    assert run('cb_train.py', *arguments, '--overwrite=True', '--max_steps=1')[0] == 0
    assert len(open(out / 'log.jsonl').readlines()) == 1


def test_accumulation_and_the_seed_decide_the_run_and_nothing_else_does(run, arguments, tmp_path):
    logs = []
    for name, more in (('a', ['--batch_size=4']), ('b', ['--batch_size=2', '--gradient_accumulation_steps=2']), ('c', ['--batch_size=4']),
                       ('d', ['--batch_size=4', '--seed=1'])):
        assert run('cb_train.py', *arguments, '--lora_dropout=0', f'--output_dir={tmp_path / name}', *more)[0] == 0
        logs.append([json.loads(line)['loss'] for line in open(tmp_path / name / 'log.jsonl')])
    assert logs[0] == pytest.approx(logs[1], rel=1e-3) and logs[0] == logs[2] and logs[0] != logs[3]
    assert (tmp_path / 'a' / 'adapter' / 'adapter_model.safetensors').read_bytes() == (tmp_path / 'c' / 'adapter' / 'adapter_model.safetensors').read_bytes()


def test_a_bfloat16_checkpoint_is_merged_in_float32_and_cast_once(tmp_path):
    source = make_model_dir(tmp_path / 'bf16', torch.bfloat16)
    delta = torch.randn(32, 32, generator=torch.Generator().manual_seed(2)) * 1e-2
    cb_train.merge(source, tmp_path / 'merged', {'layers.1.self_attn.q_proj': delta})
    load = lambda folder: {k: v for name in cb_train.shards(str(folder)) for k, v in load_file(f'{folder}/{name}').items()}
    before, after, key = load(source), load(tmp_path / 'merged'), 'model.layers.1.self_attn.q_proj.weight'
    assert torch.equal(after.pop(key), (before.pop(key).float() + delta).bfloat16())
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize('more, words', [
    (['--target_layers=9'], ['target_layers=[9]', '1..3']), (['--target_layers=0'], ['target_layers']), (['--layers_to_transform=3'], ['0..2']),
    (['--num_hidden_layers=9', '--layers_to_transform=0'], ['num_hidden_layers=9', '4 blocks']), (['--target_modules=qq_proj'], ['qq_proj', 'q_proj']),
    (['--cb_data_path=none.json'], ['none.json', 'no such file']), (['--model_name=none/such/model'], ['none/such/model']),
    (['--lora_dropout=1'], ['lora_dropout']), (['--max_steps=0'], ['max_steps=0']), (['--device=tpu'], ['device=tpu']),
    (['--dtype=int8'], ['dtype=int8']), (['--max_setps=3'], ['did you mean max_steps']), (['--schedule_steps=9', '--use_dynamic_scheduling=0'], ['schedule']),
    (['--retain_data_path=no/set'], ['no/set']), (['--target_layers='], ['target_layers'])])
def test_a_mistake_is_one_line_and_status_2_before_anything_is_written(run, arguments, tmp_path, more, words):
    status, _, err = run('cb_train.py', *arguments, *more)
    assert status == 2 and err.count('\n') == 1 and all(word in err for word in words), err
    assert not (tmp_path / 'out').exists() and not (tmp_path / 'out.partial').exists()


def test_a_bad_row_is_named_and_not_quoted(run, arguments, rows, tmp_path):
    with open(rows['retain'], 'a') as f:
        f.write('\n{"prompt": "SECRET", "response": ""}')
    status, out, err = run('cb_train.py', *arguments)
    assert status == 2 and 'row 11' in err and 'SECRET' not in out + err and not (tmp_path / 'out.partial').exists()


def test_a_folder_that_no_run_wrote_is_never_replaced(run, arguments, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'thesis.txt').write_text('mine')
    status, _, err = run('cb_train.py', *arguments, '--overwrite=True')
    assert status == 2 and 'choose another' in err and (tmp_path / 'out' / 'thesis.txt').read_text() == 'mine'
