import functools
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import filelock
import pytest
import stress
import torch
import transformers
from conftest import ROOT, SHAPE, fork_script, make_model_dir
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import cb_train
import configurator
import data_prep

ATTENTION = ['q_proj', 'k_proj', 'v_proj', 'o_proj']
TINY = ['--target_layers=2', '--lora_r=4', '--lora_alpha=8', '--max_steps=4', '--batch_size=3', '--learning_rate=1e-3',
        '--log_interval=1', '--eval_interval=2', '--device=cpu', '--dtype=auto']
Row = cb_train.Row


@pytest.fixture
def arguments(model_dir, rows, tmp_path):
    return [f'--model_name={model_dir}', f'--cb_data_path={rows["cb"]}', f'--retain_data_path={rows["retain"]}',
            f'--val_data_path={rows["val"]}', f'--output_dir={tmp_path / "out"}', *TINY]


@pytest.fixture
def adapted(model_dir):
    """Three blocks of the tiny model with a LoRA whose B is not zero, and a ragged batch: model, {name: LoRA}, token ids."""
    model = cb_train.load_decoder(model_dir, 3, 'float32', 'cpu')
    loras = cb_train.add_lora(model, ATTENTION, [0, 1, 2], 4, 8, 0.0)
    torch.manual_seed(1)
    for lora in loras.values():
        torch.nn.init.normal_(lora.lora_B, std=0.2)
    return model, loras, [[2, 4, 7, 8, 9, 3], [2, 4, 11, 3], [2, 12]]


def options(**more):
    """The options of a run as the functions take them: those of the script's own block that they read, and `more`."""
    own = dict(device='cpu', target_layers=[2], lorra_alpha=10.0, retain_distance='relative', retain_divisor='real', cb_loss='rr',
               retain_smooth=0.0, retain_noise=0.0, schedule_stop=1.0, rmu_norm=20.0, use_dynamic_scheduling=True, schedule_steps=0, max_steps=4,
               batch_size=9, micro_batch_tokens=10 ** 6,
               max_seq_length=512, seed=0, rank=0, world=1, lora_start=0.01)
    return types.SimpleNamespace(**own | more)


def stream(name, rows, c, held_out=()):
    """The stream of that name, of three blocks of width 32, over Rows."""
    sets = {key: rows for key in ('retain', 'harmful')}
    return next(s for s in cb_train.make_streams(c, sets, {key: held_out for key in sets}, 3, torch.ones(7, 32)) if s.name == name)


def counted(rows):
    """Lists of token ids as Rows all of whose tokens count."""
    return [Row(ids, [1] * len(ids), '') for ids in rows]


def parameters_of(loras):
    return [p for lora in loras.values() for p in (lora.lora_A, lora.lora_B)]


def losses_and_gradients(model, loras, rows, **more):
    """Both losses' sums over rows of ids in one batch, and the gradients of three times the one and seven times the other."""
    c = options(**more)
    losses = []
    for name, weight in (('retain', 3), ('harmful', 7)):
        its = stream(name, counted(rows), c)
        losses.append(cb_train.run_stream(model, loras, its, cb_train.my_batches(its.rows, c), c, weight / cb_train.count(its.rows))[0])
    gradients = [p.grad.clone() for p in parameters_of(loras)]
    for p in parameters_of(loras):
        p.grad = None
    return *losses, gradients


def close(a, b, relative):
    return (a - b).norm() <= relative * b.norm()


def test_one_steps_losses_and_gradients_equal_those_of_peft(adapted, model_dir):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel
    model, loras, rows = adapted
    retain, cb, gradients = losses_and_gradients(model, loras, rows, retain_distance='absolute')
    config, _ = cb_train.truncated_config(model_dir, 3)
    twin = get_peft_model(AutoModel.from_pretrained(model_dir, config=config), LoraConfig(
        r=4, lora_alpha=8, target_modules=ATTENTION, lora_dropout=0.0))
    named = dict(twin.named_parameters())
    theirs = [named[f'base_model.model.{name}.{part}.default.weight'] for name in loras for part in ('lora_A', 'lora_B')]
    for p, lora_p in zip(theirs, parameters_of(loras)):
        p.data.copy_(lora_p.data)
    real = torch.tensor([[1] * len(row) + [0] * (6 - len(row)) for row in rows])  # (B, T)
    ids = torch.tensor([row + [0] * (6 - len(row)) for row in rows])
    inputs = dict(input_ids=ids, attention_mask=real, output_hidden_states=True, use_cache=False)
    with torch.no_grad(), twin.disable_adapter():
        h = torch.stack(twin(**inputs).hidden_states)
    h_lora = torch.stack(twin(**inputs).hidden_states)  # (L + 1, B, T, D)
    real = real.bool()
    want_retain = (h_lora[1:] - h[1:]).norm(dim=-1)[:, real].mean()
    want_cb = torch.cosine_similarity(h_lora[2], h[2], dim=-1)[real].relu().mean()
    want = torch.autograd.grad(3 * want_retain + 7 * want_cb, theirs)
    assert close(retain / 12, want_retain, 1e-5) and close(cb / 12, want_cb, 1e-5) and want_cb < 0.99
    for ours, peft in zip(gradients, want):
        assert peft.norm() > 0 and close(ours, peft, 1e-5)


def test_block_checkpointing_changes_no_gradient(adapted):
    model, loras, rows = adapted
    plain = losses_and_gradients(model, loras, rows)[2]
    cb_train.checkpoint_blocks(model)
    assert all(close(a, b, 1e-6) for a, b in zip(losses_and_gradients(model, loras, rows)[2], plain))


@pytest.fixture
def ragged(adapted):
    """The model and LoRA of adapted, and nine Rows of lengths 1..9 in mixed order; of some not every token counts."""
    model, loras, _ = adapted
    draw = torch.Generator().manual_seed(3)
    return model, loras, [Row(torch.randint(2, 20, (n,), generator=draw).tolist(), [int(n < 7 or i % 3 > 0) for i in range(n)], '')
                          for n in (4, 9, 1, 6, 2, 8, 7, 3, 5)]


def plain_sums(model, loras, rows, target_layers, relative):
    """Both losses' sums over rows taken one at a time, by transformers' hidden states and torch's own functions alone."""
    retain, cb = 0, 0
    for row in rows:
        run = lambda: model(torch.tensor([row.ids]), output_hidden_states=True, use_cache=False).hidden_states
        with torch.no_grad(), cb_train.adapter_off(loras):
            h = run()
        h_lora, mask = run(), torch.tensor(row.mask, dtype=torch.float32)
        for a, b in zip(h[1:], h_lora[1:]):
            retain = retain + ((b - a).norm(dim=-1)[0] / (a.norm(dim=-1)[0] / 8.7 if relative else 1) * mask).sum() / (len(h) - 1)
        for l in target_layers:
            cb = cb + (torch.cosine_similarity(h[l], h_lora[l], dim=-1)[0].relu() * mask).sum() / len(target_layers)
    return retain, cb


@pytest.mark.parametrize('batch_size, tokens, checkpointing, distance', [
    (9, 10 ** 6, False, 'relative'), (1, 1, False, 'relative'), (2, 10 ** 6, False, 'absolute'), (9, 16, False, 'relative'),
    (3, 12, True, 'relative')])
def test_any_split_of_a_step_gives_the_losses_and_gradients_of_a_plain_loop(ragged, batch_size, tokens, checkpointing, distance):
    model, loras, rows = ragged
    parameters = parameters_of(loras)
    want = plain_sums(model, loras, rows, [1, 2], distance == 'relative')
    if checkpointing:
        cb_train.checkpoint_blocks(model)
    c = options(target_layers=[1, 2], batch_size=batch_size, micro_batch_tokens=tokens, retain_distance=distance)
    for name, loss in zip(('retain', 'harmful'), want):
        its = stream(name, rows, c)
        assert close(cb_train.run_stream(model, loras, its, cb_train.my_batches(rows, c), c, 0.3)[0], loss, 1e-5)
        for parameter, gradient in zip(parameters, torch.autograd.grad(0.3 * loss, parameters, retain_graph=True, materialize_grads=True)):
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert close(found, gradient, 1e-5)
            parameter.grad = None


def test_micro_batches_take_each_row_once_by_length_and_keep_to_both_limits(ragged):
    _, _, rows = ragged
    lengths = lambda *limits: [[len(row.ids) for row in batch] for batch in cb_train.micro_batches(rows, *limits)]
    assert lengths(9, 18) == [[9, 8], [7, 6], [5, 4, 3], [2, 1]] and lengths(2, 18) == [[9, 8], [7, 6], [5, 4], [3, 2], [1]]
    assert lengths(9, 1) == [[n] for n in range(9, 0, -1)]


def test_rows_are_padded_on_the_right_and_pads_never_count():
    ids, mask = cb_train.pad([Row([5, 6, 7], [0, 1, 1], ''), Row([8], [1], '')], 'cpu')
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]] and mask.tolist() == [[0, 1, 1], [1, 0, 0]] and mask.dtype == torch.float32


def test_a_start_moves_the_states_by_one_percent_whatever_the_models_scale(tmp_path, adapted):
    for factor in (1, 100):
        base = scaled_dir(tmp_path / str(factor), factor)
        model = cb_train.load_decoder(base, 3, 'float32', 'cpu')
        loras = cb_train.add_lora(model, ATTENTION, [0, 1, 2], 4, 8, 0.0, relative=True)
        c, rows = options(target_layers=[1, 2]), counted(adapted[2])
        reached = cb_train.draw_start(model, loras, cb_train.my_batches(rows, c), c)
        h, h_lora = cb_train.reference_and_adapted(model, loras, torch.tensor([rows[0].ids]))
        found = torch.stack([((h_lora[l] - h[l]).norm(dim=-1) / h[l].norm(dim=-1)).mean() for l in (1, 2)]).mean().item()
        assert reached == pytest.approx(0.01, rel=0.02) and 0.004 < found < 0.02


def test_a_start_in_half_precision_does_not_take_rounding_for_movement(tmp_path, adapted):
    base, size = scaled_dir(tmp_path / 'base', 1), {}
    for dtype in ('float32', 'bfloat16'):
        model = cb_train.load_decoder(base, 3, dtype, 'cpu')
        torch.manual_seed(0)
        loras = cb_train.add_lora(model, ATTENTION, [0, 1, 2], 4, 8, 0.0, relative=True)
        c, rows = options(target_layers=[1, 2]), counted(adapted[2])
        cb_train.draw_start(model, loras, cb_train.my_batches(rows, c), c)
        size[dtype] = cb_train.root_mean_square(loras['layers.0.self_attn.q_proj'].lora_B)
    assert size['bfloat16'] == pytest.approx(size['float32'], rel=0.1)


def test_the_other_cb_losses_are_what_a_hand_computes():
    u, mask = torch.tensor([0.6, 0.8]), torch.ones(1, 2)
    h_lora = [torch.tensor([[[6.0, 8.0], [-3.0, -4.0]]])]
    assert cb_train.random_direction_loss(h_lora, h_lora, mask, [0], u).item() == pytest.approx(0 + 2.0, abs=1e-6)
    h_lora = [torch.tensor([[[6.0, 9.0], [6.0, 8.0]]])]
    assert cb_train.rmu_loss(h_lora, h_lora, mask, [0], 10 * u).item() == pytest.approx((0 ** 2 + 1 ** 2) / 2 + 0)


def test_the_answer_alone_of_harmful_rows_and_all_of_benign_rows_can_count(run, arguments, tmp_path):
    found = {}
    for loss_on in ('all', 'response', 'harmful_response'):
        status, out, err = run('cb_train.py', *arguments, f'--loss_on={loss_on}', f'--output_dir={tmp_path / loss_on}', '--max_steps=1')
        assert status == 0, err
        found[loss_on] = [int(line.split('about ')[1].split()[0]) for line in out.splitlines() if 'rows are read' in line]
    assert found['harmful_response'] == [found['all'][0], found['response'][1]]  # retain, harmful
    assert found['response'][0] < found['all'][0] and found['response'][1] < found['all'][1]


def test_the_lora_is_what_its_equation_says_and_drops_elements_of_its_input():
    lora = cb_train.LoRALinear(torch.nn.Linear(1000, 8), 8, 16, 0.25, unit=3.0)
    lora.lora_A.data, lora.lora_B.data = torch.ones(8, 1000), torch.eye(8)
    out = lora(torch.ones(4, 50, 1000)) - lora.base(torch.ones(4, 50, 1000))  # 3 * 16 / 8 / 0.75 times the elements that are left
    assert out.mean().item() == pytest.approx(6000, rel=5e-3) and len(set(out[:, :, 0].flatten().round().tolist())) > 20
    assert torch.allclose(lora.eval()(torch.ones(1, 1000)), lora.base(torch.ones(1, 1000)) + 6000)
    assert torch.equal(lora.delta(slice(2, 4)), torch.full((2, 1000), 6.0))


def test_relative_lora_is_in_units_of_its_weights_root_mean_square(model_dir):
    model = cb_train.load_decoder(model_dir, 3, 'float32', 'cpu')
    model.layers[0].self_attn.q_proj.weight.data = torch.full((32, 32), 0.1)
    loras = cb_train.add_lora(model, ['q_proj'], [0], 4, 8, 0.0, relative=True)
    assert loras['layers.0.self_attn.q_proj'].scale == pytest.approx(0.1 / 0.02 * 8 / 4)


def test_in_half_precision_flash_attention_is_asked_for_on_a_gpu_that_has_it_and_eager_on_a_cpu(model_dir, monkeypatch, capsys):
    asked, there = [], {'flash': False}
    monkeypatch.setattr(cb_train, 'is_flash_attn_2_available', lambda: there['flash'])
    monkeypatch.setattr(transformers.PreTrainedModel, 'set_attn_implementation', lambda self, name: asked.append(name))
    monkeypatch.setattr(transformers.PreTrainedModel, 'to', lambda self, device: self)

    def asked_for(dtype, device):
        asked.clear()
        cb_train.load_decoder(model_dir, 3, dtype, device)
        return asked[:]
    cases = ('bfloat16', 'cuda'), ('float16', 'cuda:1'), ('float32', 'cuda'), ('bfloat16', 'cpu')
    assert [asked_for(*case) for case in cases] == [[], [], [], ['eager']]
    there['flash'] = True
    assert [asked_for(*case) for case in cases] == [['flash_attention_2']] * 2 + [[], ['eager']]
    with monkeypatch.context() as patch:  # built for another torch
        patch.setattr(transformers.PreTrainedModel, 'set_attn_implementation', lambda self, name: __import__('no_flash_attn'))
        with pytest.raises(SystemExit) as stop:
            asked_for('bfloat16', 'cuda')
        assert stop.value.code == 2 and 'flash-attn is installed and cannot be used' in capsys.readouterr().err
    monkeypatch.setattr(transformers.LlamaModel, '_compatible_flash_implementations', ['own'], raising=False)
    assert asked_for('bfloat16', 'cuda') == []
    monkeypatch.setattr(transformers.LlamaModel, '_supports_flash_attn', False)
    assert asked_for('bfloat16', 'cuda') == []


@pytest.mark.parametrize('name, value, words', [('num_key_value_heads', 4, 'k_proj'), ('vocab_size', 40, 'embed_tokens')])
def test_weights_that_do_not_fit_the_config_are_one_line(run, arguments, tmp_path, name, value, words):
    base = make_model_dir(tmp_path / 'base')
    config = json.load(open(f'{base}/config.json'))
    json.dump({**config, name: value}, open(f'{base}/config.json', 'w'))
    status, _, err = run('cb_train.py', *arguments, f'--model_name={base}')
    assert status == 2 and err.count('\n') == 1 and words in err, err


@pytest.mark.parametrize('device', ['auto', 'cuda', 'cuda:0'])
def test_on_a_gpu_a_run_comes_as_far_as_its_weights_with_and_without_a_number(run, arguments, monkeypatch, device):
    moved, real = [], torch.nn.Module.to

    def to(self, *where, **more):
        if where[:1] and str(where[0]).startswith('cuda'):
            moved.append(where[0])
            raise KeyboardInterrupt  # there is none here
        return real(self, *where, **more)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda where: torch.device(where).index + 0)
    monkeypatch.setattr(torch.nn.Module, 'to', to)
    run('cb_train.py', *arguments, f'--device={device}')
    assert moved == [device.replace('auto', 'cuda')]


def test_what_a_model_keeps_beside_its_modules_goes_to_the_device_and_mapped_blocks_stay_on_the_cpu(model_dir, monkeypatch):
    real = cb_train.AutoModel.from_pretrained

    def load(*more, **named):
        model, report = real(*more, **named)
        model.register_parameter('scale', torch.nn.Parameter(torch.ones(1)))  # as Zaya's
        return model, report
    monkeypatch.setattr(cb_train.AutoModel, 'from_pretrained', load)
    for mapped in (False, True):
        model = cb_train.load_decoder(model_dir, 2, 'float32', 'meta', mapped)
        assert {model.scale.device.type, model.embed_tokens.weight.device.type, model.norm.weight.device.type} == {'meta'}
        assert {p.device.type for p in model.layers.parameters()} == {'cpu' if mapped else 'meta'} and len(model.layers) == 2


def test_checkpointing_and_the_seed_give_the_same_bytes(run, arguments, tmp_path):
    for name in ('True', 'False', 'again'):
        more = [f'--output_dir={tmp_path / name}', f'--gradient_checkpointing={name == "True"}']
        assert run('cb_train.py', *arguments, *more)[0] == 0
    adapters = {(tmp_path / name / 'adapter' / 'adapter_model.safetensors').read_bytes() for name in ('True', 'False', 'again')}
    assert len(adapters) == 1


def test_with_the_adapter_off_the_states_are_the_librarys_bit_for_bit(adapted, model_dir):
    model, loras, rows = adapted
    whole = AutoModelForCausalLM.from_pretrained(model_dir)
    ids = torch.tensor(rows[:1])
    want = whole(ids, output_hidden_states=True).hidden_states
    h, h_lora = cb_train.reference_and_adapted(model, loras, ids)
    assert torch.equal(h[0], want[0]) and not h[3].requires_grad and h_lora[3].requires_grad
    for l in (1, 2, 3):
        assert not torch.equal(h[l], h_lora[l])
        assert torch.equal(h[l], want[l] if l < 3 else whole.model.norm(want[3]))
    assert all(lora.enabled for lora in loras.values())


def test_the_losses_are_what_a_hand_computes():
    h, mask = [torch.tensor([[[3.0, 4.0], [1.0, 0.0], [5.0, 5.0]]])], torch.tensor([[1.0, 1.0, 0.0]])
    h_lora = [torch.tensor([[[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]]])]
    assert cb_train.retain_loss(h, h_lora, mask, [0], relative=False).item() == pytest.approx(5 + 1)
    assert cb_train.retain_loss(h, h_lora, mask, [0]).item() == pytest.approx(8.7 * (5 / 5 + 1 / 1))
    assert cb_train.retain_loss(h, h_lora, mask, [0], smooth=0.75).item() == pytest.approx(8.7 * (1.25 - 0.75) * 2)
    assert cb_train.retain_loss(h, h_lora, mask, [0], relative=False, smooth=12.0).item() == pytest.approx((13 - 12) + (145 ** 0.5 - 12))
    turned = [torch.tensor([[[4.0, 3.0], [-2.0, 0.0], [1.0, 1.0]]])]
    assert cb_train.cosine(h[0], turned[0])[0].tolist() == pytest.approx([24 / 25, -1.0, 1.0])
    assert cb_train.rerouting_loss(h * 2, turned * 2, mask, [0, 1]).item() == pytest.approx(24 / 25 + 0)
    assert cb_train.rerouting_loss(h, turned, mask, [0], leak=0.1).item() == pytest.approx(24 / 25 - 0.1)
    same = [torch.ones(1, 1, 2, requires_grad=True)]
    loss = cb_train.retain_loss([torch.ones(1, 1, 2)], same, torch.ones(1, 1), [0])
    assert torch.autograd.grad(loss, same)[0].tolist() == [[[0.0, 0.0]]]
    near = [torch.tensor([[[1.0, 1.001]]], requires_grad=True)]
    kink, smooth = (torch.autograd.grad(cb_train.retain_loss([torch.ones(1, 1, 2)], near, torch.ones(1, 1), [0], smooth=s), near)[0].norm().item()
                    for s in (0.0, 0.1))
    assert kink == pytest.approx(8.7 / 2 ** 0.5, rel=1e-3) and smooth == pytest.approx(8.7 / 2 ** 0.5 * (0.001 / 2 ** 0.5) / 0.1, rel=1e-3)


@pytest.mark.parametrize('step, ticks, want', [(0, 150, (0, 10)), (75, 150, (5, 5)), (150, 300, (5, 5)), (200, 150, (10, 0)), (7, 0, (10, 10))])
def test_the_schedule_moves_the_weight_from_cb_to_retain(step, ticks, want):
    assert cb_train.coefficients(step, 10.0, ticks) == pytest.approx(want)


@pytest.mark.parametrize('step, want', [(0, (0, 10)), (20, (2, 8)), (50, (5, 5)), (149, (5, 5))])
def test_the_schedule_stops_where_schedule_stop_says(step, want):
    assert cb_train.coefficients(step, 10.0, 100, stop=0.5) == pytest.approx(want)


def test_a_mask_counts_what_loss_on_says_and_leaves_the_templates_head_out_of_the_cb_loss():
    mask = lambda stream, loss_on: cb_train.token_mask([9] * 6, stream, loss_on, head=2, answer=4)
    assert mask('retain', 'all') == [1] * 6 and mask('harmful', 'all') == [0, 0, 1, 1, 1, 1]
    assert mask('retain', 'response') == mask('harmful', 'response') == [0, 0, 0, 0, 1, 1]
    assert mask('retain', 'harmful_response') == [1] * 6 and mask('harmful', 'harmful_response') == [0, 0, 0, 0, 1, 1]


def test_each_harmful_answer_stands_behind_each_kind_of_context_and_alone_counts(model_dir):
    harmful = [(f'h{i}', data_prep.turns((f'tell me {word}', f'{word} apples'))) for i, word in enumerate(['one', 'two'])]
    benign = [('b0', data_prep.turns(('yes', 'no'), ('blue', 'green'))), ('b1', data_prep.turns(('red', 'plums')))]
    kinds = ['own', 'nothing', 'noise']
    mixed = lambda seed: list(data_prep.in_contexts(harmful, benign, kinds, random.Random(seed)))
    requests = [[message['content'] for message in messages[:-1]] for _, messages in mixed(0)]
    assert requests[0::3] == [['tell me one'], ['tell me two']] and requests[1::3] == [[''], ['']]
    for (own,), (noise,) in zip(requests[0::3], requests[2::3]):
        before, after = noise.split(own)
        assert len(before.split()) <= 8 and len(after.split()) <= 8
        assert {*before.split(), *after.split()} <= {'yes', 'no', 'blue', 'green', 'red', 'plums'}
    assert len({mixed(seed)[2][1][0]['content'] for seed in range(9)}) > 5
    assert [messages[-1]['content'] for _, messages in mixed(0)] == ['one apples'] * 3 + ['two apples'] * 3
    assert [where for where, _ in mixed(0)] == ['h0'] * 3 + ['h1'] * 3
    assert mixed(0) == mixed(0) and any(mixed(0) != mixed(seed) for seed in range(1, 9))
    assert list(data_prep.in_contexts(harmful, benign, ['own'], random.Random(0))) == harmful
    tokenizer = data_prep.load_tokenizer(model_dir)
    for _, messages in mixed(0):  # whatever stands before it, "one apples <end>" counts and nothing else
        ids, head, answer = data_prep.encode(tokenizer, messages, 512)
        counted = [token for token, counts in zip(ids, cb_train.token_mask(ids, 'harmful', 'harmful_response', head, answer)) if counts]
        assert tokenizer.decode(counted) == f'{messages[-1]["content"]} <end>'


def test_held_out_harmful_answers_stand_behind_the_kinds_of_context_that_the_run_has(arguments, model_dir):
    tokenizer = data_prep.load_tokenizer(model_dir)
    before = {}
    for contexts in ('own', 'nothing'):
        c = configurator.configure(cb_train.__file__, [*arguments, f'--contexts={contexts}', '--loss_on=harmful_response'])
        _, held_out = cb_train.load_sets(types.SimpleNamespace(**c), tokenizer)
        before[contexts] = [row.ids[:row.mask.index(1)] for row in held_out['harmful']]
    assert before['nothing'] == [data_prep.prompt_ids(tokenizer, data_prep.turns(('', ''))[:1])] * len(before['own'])
    assert not set(map(tuple, before['own'])) & set(map(tuple, before['nothing']))


def test_benign_rows_stand_behind_the_kinds_of_context_that_retain_contexts_says_and_half_of_them_amid_noise(arguments, model_dir):
    tokenizer, asked = data_prep.load_tokenizer(model_dir), {}
    for contexts in ('own', 'own,noise'):
        c = configurator.configure(cb_train.__file__, [*arguments, f'--retain_contexts={contexts}', '--max_steps=9'])
        rows, _ = cb_train.load_sets(types.SimpleNamespace(**c), tokenizer)
        asked[contexts] = {tuple(row.ids) for row in rows['retain']}
    longer = [ids for ids in asked['own,noise'] if ids not in asked['own']]
    assert asked['own'] & asked['own,noise'] and 0.3 < len(longer) / len(asked['own,noise']) < 0.7


def test_scrambled_rows_are_a_harmful_answers_words_in_random_order_and_benign_answers_with_some_of_them_at_their_places():
    harmful = [('h0', data_prep.turns(('tell me one', 'one two three four five')))]
    benign = [('b0', data_prep.turns(('yes', 'no'), ('blue', 'a b c d e f g'))), ('b1', data_prep.turns(('red', 'plums')))]
    drawn = lambda seed: list(data_prep.scrambled_rows(harmful, benign, 2000, random.Random(seed)))
    rows = drawn(0)
    assert len(rows) == 2000 and {where for where, _ in rows[0::2]} == {'h0'}
    requests = [[message['content'] for message in messages[:-1]] for _, messages in rows]
    answers = [messages[-1]['content'].split() for _, messages in rows]
    assert requests[0::2] == [['tell me one']] * 1000
    assert all(sorted(answer) == ['five', 'four', 'one', 'three', 'two'] for answer in answers[0::2])
    assert len(set(map(tuple, answers[0::2]))) == 120  # every order of five words
    long = [answer for request, answer in zip(requests[1::2], answers[1::2]) if request == ['yes', 'no', 'blue']]
    own = {'b0': ['yes', 'no', 'blue'], 'b1': ['red']}  # each is named by the row that it comes from
    assert 400 < len(long) < 600 and all(request == own[where] for request, (where, _) in zip(requests[1::2], rows[1::2]))
    places = list(zip('a b c d e f g'.split(), 'one two three four five one two'.split()))  # a longer answer: from the start
    assert all(word in pair for answer in long for word, pair in zip(answer, places)) and {len(answer) for answer in long} == {7}
    taken = [sum(word != own for word, (own, _) in zip(answer, places)) / 7 for answer in long]
    assert min(taken) == 0 and 0.25 < sum(taken) / len(taken) < 0.35  # a share of 0 to 0.6, drawn for each row
    assert harmful[0][1][-1]['content'] == 'one two three four five'  # what was given stays
    assert rows == drawn(0) != drawn(1)


def test_scrambled_rows_are_retained_and_are_no_held_out_rows(arguments, model_dir):
    tokenizer, found = data_prep.load_tokenizer(model_dir), {}
    for share in ('0', '0.5'):
        c = types.SimpleNamespace(**configurator.configure(cb_train.__file__, [*arguments, f'--scrambled={share}', '--max_steps=9']))
        found[share] = cb_train.load_sets(c, tokenizer)
    assert found['0'][1] == found['0.5'][1] and found['0'][0]['harmful'] == found['0.5'][0]['harmful']
    c.val_data_path = ''  # a tenth of each set is held out
    rows, held_out = cb_train.load_sets(c, tokenizer)
    assert held_out['harmful'] and not {row.where for row in held_out['harmful']} & {row.where for row in rows['retain']}
    harmful = {row.where for row in found['0'][0]['harmful']}
    assert harmful & {row.where for row in found['0.5'][0]['retain']} and not harmful & {row.where for row in found['0'][0]['retain']}


def test_the_first_tokens_of_harmful_answers_alone_do_not_count_if_opening_says_so(arguments, model_dir):
    tokenizer, found = data_prep.load_tokenizer(model_dir), {}
    for opening in (0, 2):
        c = configurator.configure(cb_train.__file__, [*arguments, '--loss_on=harmful_response', f'--opening={opening}', '--max_steps=9'])
        found[opening] = cb_train.load_sets(types.SimpleNamespace(**c), tokenizer)
    for whole, cut in zip(found[0], found[2]):  # of the run, and held out
        assert whole['retain'] == cut['retain'] and len(whole['harmful']) == len(cut['harmful'])
        for a, b in zip(whole['harmful'], cut['harmful']):
            first = a.mask.index(1)
            assert b == a._replace(mask=[0] * (first + 2) + a.mask[first + 2:])


def test_tokens_out_of_place_do_not_count_and_what_stands_behind_them_does():
    row = Row([2, 4, 7, 5, 20, 21, 22, 23, 24, 25, 3], [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1], 'row 1', 2)
    assert cb_train.inserted(row, 6, 7, [8, 9]) == Row([2, 4, 7, 5, 20, 21, 8, 9, 23, 24, 25, 3], [0] * 4 + [1, 1, 0, 0, 1, 1, 1, 1], 'row 1', 2)
    rng, places, lengths, foreign = random.Random(0), [], set(), 0
    for _ in range(500):
        broken = cb_train.broken_row(row, [12, 13], rng)
        assert len(broken.ids) == len(broken.mask) and broken[2:] == row[2:]
        assert broken.ids[:4] == row.ids[:4] and not any(broken.mask[:4])  # what stands before the answer stays
        told = [i for i, counts in zip(broken.ids, broken.mask) if counts]  # the answer in its order, but for what was replaced
        assert told == [i for i in row.ids[4:] if i in told] and told[-1] == 3
        strange = [i for i, counts in list(zip(broken.ids, broken.mask))[4:] if not counts]
        assert set(strange) <= {12, 13} or set(strange) <= {20, 21, 22, 23, 24, 25}
        foreign += set(strange) <= {12, 13}
        places.append(broken.mask.index(0, 4) - 4)
        lengths.add(len(strange))
    assert lengths == set(range(1, 16)) and 150 < foreign < 350
    assert set(places) == set(range(7)) and places.count(0) > places.count(3) > 0
    assert cb_train.broken_row(row, [12], random.Random(1)) == cb_train.broken_row(row, [12], random.Random(1))


def test_strange_words_stand_before_a_share_of_the_harmful_requests_and_noise_may_move_them_alone(arguments, model_dir):
    found = {}
    tokenizer = data_prep.load_tokenizer(model_dir)
    for strange in (0, 0.5):
        more = [f'--strange={strange}', '--contexts=own,nothing', '--loss_on=harmful_response', '--max_steps=100']
        c = types.SimpleNamespace(**configurator.configure(cb_train.__file__, [*arguments, *more]))
        found[strange], held_out = cb_train.load_sets(c, tokenizer)
        assert {row.noisy[1] - row.noisy[0] for row in held_out['harmful']} == {0}
    assert found[0]['retain'] == found[0.5]['retain'] and {row.noisy == (1, row.end) for row in found[0]['retain']} == {True}
    lengths, asked = [], 0
    for plain, row in zip(found[0]['harmful'], found[0.5]['harmful'], strict=True):
        at, stop = row.noisy
        assert plain.noisy == (at, at) == (2, 2)  # behind <bos> <user>
        assert row.ids[:at] + row.ids[stop:] == plain.ids and row.mask[:at] + row.mask[stop:] == plain.mask
        assert row.end - plain.end == stop - at and not any(row.mask[at:stop])
        assert not {*row.ids[at:stop]} & {*tokenizer.all_special_ids}
        asked += plain.end > 2
        lengths += [stop - at] if stop > at else []
        assert stop == at or plain.end > 2  # never where there is no request
    assert 0.4 < len(lengths) / asked < 0.6 and asked < len(found[0]['harmful']) and set(lengths) == set(range(1, 13))


def test_soft_tokens_stand_in_a_share_of_each_steps_harmful_rows_where_an_attack_puts_its_own_and_stay_by_turns(arguments, model_dir):
    import cb_eval
    more = ['--soft_contexts=0.5', '--soft_steps=4', '--soft_tokens=3', '--batch_size=2', '--gradient_accumulation_steps=2', '--max_steps=8']
    c = types.SimpleNamespace(**configurator.configure(cb_train.__file__, [*arguments, *more]))
    tokenizer = data_prep.load_tokenizer(model_dir)
    rows, held_out = cb_train.load_sets(c, tokenizer)
    c.soft_contexts = 0.0
    plain, _ = cb_train.load_sets(c, tokenizer)
    assert [(row.soft > 0, row.slot) for row in rows['harmful']] == [(True, 0), (True, 1), (False, 0), (False, 0)] * 8
    assert {row.soft for row in [*rows['retain'], *held_out['harmful']]} == {0}
    assert rows['harmful'][2::4] == plain['harmful'][2::4] and rows['retain'] == plain['retain']
    of_slot = [rows['harmful'][slot::4] for slot in (0, 1)]
    assert [[a == b for a, b in zip(some, some[1:])] for some in of_slot] == [
        [True, True, True, False, True, True, True], [True, False, True, True, True, False, True]]
    conversations = dict(data_prep.load_rows(c.cb_data_path))
    for row in (of_slot[0][0], of_slot[0][4], of_slot[1][2], of_slot[1][6]):
        before, after = cb_eval.around(tokenizer, conversations[row.where][:-1])
        behind, answer = row.end + row.soft, row.end + row.soft + len(after)
        assert row.ids[:row.end] == before and row.ids[behind:answer] == after and 1 <= row.soft <= 3
        assert not any(row.mask[row.end:behind]) and all(row.mask[answer:])
        assert not {*row.ids[row.end:behind]} & {*tokenizer.all_special_ids}


def test_an_adversary_moves_its_tokens_alone_and_the_loss_up(adapted):
    model, loras, _ = adapted
    rows = [Row([2, 4, 7, 8, 9, 3], [0, 0, 0, 1, 1, 1], '', 1, 2, 1), Row([2, 4, 11, 3], [0, 0, 0, 1], '', 0, 1, 0), Row([2, 5, 12], [0, 1, 1], '')]
    c = options(soft_lr=0.1, soft_start=0.0, soft_tokens=2)
    optimizer = torch.optim.AdamW(parameters_of(loras), lr=0.0)
    embeddings = model.get_input_embeddings().weight
    soft = cb_train.add_adversary(optimizer, embeddings, rows, c)
    assert soft.shape == (2, 2, 32) and not soft.any()
    assert optimizer.param_groups[1]['lr'] == pytest.approx(0.1 * embeddings.square().mean().sqrt().item())
    its = stream('harmful', rows, c)._replace(soft=soft)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(cb_train.run_stream(model, loras, its, [rows[:2], rows[2:]], c, 1.0)[0].item())
        before, up = soft.detach().clone(), soft.grad.sign()
        optimizer.step()
        assert torch.allclose(soft, before + optimizer.param_groups[1]['lr'] * up, atol=1e-6)  # a signed step, no moments
    assert losses[0] == pytest.approx(cb_train.run_stream(model, loras, its, [rows], c)[0].item(), rel=1e-5)  # without a weight nothing is moved
    assert losses[-1] > losses[0] + 0.1 and (soft.abs().sum(-1) > 0).tolist() == [[True, False], [True, True]]

    # the states are those of transformers for embeddings that were moved by hand; the reference stays
    ids, _ = cb_train.pad(rows, 'cpu')
    h, h_lora = cb_train.reference_and_adapted(model, loras, ids, soft=cb_train.soft_context(soft, rows, 6))
    embedded = embeddings[ids].detach().clone()
    embedded[0, 1:3] += soft[1]
    embedded[1, 0] += soft[0, 0]
    want = model(inputs_embeds=embedded, output_hidden_states=True, use_cache=False).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(h_lora, want))
    with torch.no_grad(), cb_train.adapter_off(loras):
        assert all(torch.equal(a, b) for a, b in zip(h, cb_train.hidden_states(model, ids)))


def test_an_adversarys_tokens_start_anew_with_their_row(arguments, model_dir, tmp_path):
    more = ['--soft_contexts=0.5', '--soft_steps=4', '--soft_tokens=3', '--batch_size=2', '--gradient_accumulation_steps=2', '--max_steps=8']
    c = types.SimpleNamespace(**configurator.configure(cb_train.__file__, [*arguments, *more]))
    rows, held_out = cb_train.load_sets(c, data_prep.load_tokenizer(model_dir))
    c.__dict__.update(micro_batch_tokens=512, rank=0, world=1, target_layers=[2], save_interval=1, eval_interval=99, log_interval=99, device='cpu')
    model, saved = cb_train.load_decoder(model_dir, 3, 'auto', 'cpu'), []
    loras = cb_train.add_lora(model, ATTENTION, [0, 1, 2], 4, 4, 0.0)
    optimizer = torch.optim.AdamW([{'params': parameters_of(loras), 'lr': 1e-3}])
    soft = cb_train.add_adversary(optimizer, model.get_input_embeddings().weight, rows['harmful'], c)
    streams = cb_train.make_streams(c, rows, held_out, 3, model.get_input_embeddings().weight, soft)
    state = {'step': 0, 'tokens': 0, 'seconds': 0.0, 'log_bytes': 0, 'record': {}}
    def save(state):
        saved.append([bool(slot.abs().max() > 50) for slot in soft])
        soft.data += 100  # what no step undoes
    with open(tmp_path / 'log', 'w') as log:
        cb_train.train(model, loras, optimizer, streams, c, state, save, log)
    assert saved == [[step not in (0, 4), step not in (0, 2, 6)] for step in range(8)]  # after a step with a new row


def test_soft_tokens_of_a_new_row_start_at_noise_of_any_size_the_same_on_every_rank_and_the_others_stay():
    soft = torch.full((400, 3, 32), 7.0)
    earlier = [Row([2, 4], [1, 1], '', 1, soft=1, slot=slot) for slot in range(400)] + [Row([2, 4], [1, 1], '', 1)]
    rows = [earlier[0], *(row._replace(ids=[2, 5]) for row in earlier[1:])]  # slot 0's row stays; the last is not attacked
    slots = list(range(1, 400))
    cb_train.restart(soft, rows, earlier, 2.0, 'seed')
    assert (soft[0] == 7).all()
    sizes = soft[slots].flatten(1).std(1)
    assert sizes.min() < 0.05 and sizes.max() == pytest.approx(2.0, rel=0.15) and sizes.mean() == pytest.approx(1.0, rel=0.1)
    torch.manual_seed(5)  # a rank's own
    again = torch.zeros(400, 3, 32)
    cb_train.restart(again, rows, earlier, 2.0, 'seed')
    assert torch.equal(again[slots], soft[slots]) and not again[0].any()
    cb_train.restart(again, rows, earlier, 2.0, 'another')
    assert not torch.equal(again[slots], soft[slots])
    cb_train.restart(again, rows, earlier, 0.0, 'seed')
    assert not again.any()


def test_noise_stands_at_the_noisy_places_of_half_of_the_rows_and_nowhere_else():
    torch.manual_seed(0)
    rows = [Row([2, 4, 7, 8, 9, 3], [1] * 6, '', 4, noisy=places) for places in ((1, 4), (1, 3), (2, 2), (0, 0))] * 500
    noise = cb_train.request_noise(rows, 7, 32, 0.5, 'cpu')
    assert noise.shape == (2000, 7, 32)
    long, short = noise[0::4], noise[1::4]
    assert not long[:, [0, 4, 5, 6]].any() and not short[:, [0, 3, 4, 5, 6]].any() and not noise[2::4].any() and not noise[3::4].any()
    sizes = long[:, 1:4].flatten(1).std(1)  # one size a row
    assert (sizes == 0).sum() == pytest.approx(250, abs=40) and sizes.max() == pytest.approx(0.5, rel=0.2)
    assert sizes[sizes > 0].mean() == pytest.approx(0.25, rel=0.1)


def test_the_unit_of_noise_and_soft_tokens_is_the_root_mean_square_of_every_nth_embedding():
    table = torch.nn.Embedding(10000, 3)
    found = cb_train.input_embeddings(types.SimpleNamespace(get_input_embeddings=lambda: table))
    assert torch.equal(found, table.weight[::3])
    assert cb_train.root_mean_square(torch.tensor([[3.0, 4.0], [0.0, 0.0]])) == 2.5


def test_noise_moves_the_embeddings_of_both_passes_of_training_soft_tokens_those_of_one_and_neither_of_a_validation(adapted):
    model, loras, _ = adapted
    ids = torch.tensor([[2, 4, 7, 8], [2, 5, 9, 3]])
    noise, soft = torch.randn(2, 2, 4, 32)
    with torch.no_grad():
        found = cb_train.reference_and_adapted(model, loras, ids, noise, soft)
        embedded = model.get_input_embeddings().weight[ids] + noise
        moved = model(inputs_embeds=embedded + soft, output_hidden_states=True, use_cache=False).hidden_states
        with cb_train.adapter_off(loras):
            reference = model(inputs_embeds=embedded, output_hidden_states=True, use_cache=False).hidden_states
    for h, want in zip(found, (reference, moved)):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(h, want, strict=True))
    alone, _ = cb_train.reference_and_adapted(model, loras, ids, noise)
    assert all(torch.equal(a, b) for a, b in zip(alone, reference))

    rows = [Row([2, 4, 7, 8, 9, 3], [1] * 6, '', 5, noisy=(1, 5)) for _ in range(8)]
    c = options(retain_noise=2.0)
    c.micro_batch_tokens, its = 6, stream('retain', rows, c)
    assert its.noise == stream('harmful', rows, c).noise == pytest.approx(2.0)  # of embeddings that are all 1
    plain = cb_train.run_stream(model, loras, its, cb_train.my_batches(rows, c), c)[0]
    assert plain == cb_train.run_stream(model, loras, its._replace(noise=0.0), cb_train.my_batches(rows, c), c, 1.0)[0]
    assert abs(plain - cb_train.run_stream(model, loras, its, cb_train.my_batches(rows, c), c, 1.0)[0]) > 1e-3 * plain
    for lora in loras.values():
        torch.nn.init.zeros_(lora.lora_B)
    assert cb_train.run_stream(model, loras, its, cb_train.my_batches(rows, c), c, 1.0)[0] == 0.0  # h' = h, whatever the noise


def test_what_a_template_writes_around_a_request_is_found(model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    head, tail = data_prep.template_ends(tokenizer, tokenizer.chat_template)
    assert tokenizer.convert_ids_to_tokens(head) == ['<bos>', '<user>'] and tokenizer.convert_ids_to_tokens(tail) == ['<end>', '<assistant>']


def test_a_linear_scheduler_takes_half_a_step_half_way(run, arguments, tmp_path):
    found = {}
    for name, more in {'one': ['--max_steps=1'], 'constant': ['--max_steps=2'], 'linear': ['--max_steps=2', '--lr_scheduler=linear']}.items():
        status, _, err = run('cb_train.py', *arguments, *more, '--batch_size=4', '--schedule_steps=8', '--log_interval=1', f'--output_dir={tmp_path / name}')
        assert status == 0, err
        found[name] = load_file(tmp_path / name / 'adapter' / 'adapter_model.safetensors')
    for key, one in found['one'].items():  # AdamW's second step is that of equal moments, at half the rate
        torch.testing.assert_close(found['linear'][key] - one, (found['constant'][key] - one) / 2, atol=2e-7, rtol=1e-3)
    assert [record['learning_rate'] for record in records_of(tmp_path / 'linear')] == [1e-3, 5e-4]
    assert [record['learning_rate'] for record in records_of(tmp_path / 'constant')] == [1e-3, 1e-3]


def test_a_run_in_mixed_contexts_reads_three_times_as_many_harmful_rows_and_says_so_in_its_card(run, arguments, tmp_path):
    status, out, err = run('cb_train.py', *arguments, '--contexts=own,nothing,noise', '--loss_on=harmful_response', '--max_steps=12')
    assert status == 0, err
    assert 'harmful: 12 rows are read' in out  # each of the twelve answers three times in one epoch of 36
    assert "| contexts | ['own', 'nothing', 'noise'] |" in (tmp_path / 'out' / 'README.md').read_text()


def test_a_run_reads_every_row_once_an_epoch_in_an_order_of_the_seed_and_encodes_no_other(capsys):
    encoded = []

    def to_row(messages, where):
        encoded.append(where)
        return Row([messages], [int(messages != 3)], where)
    conversations = [(f'row {i}', i) for i in range(12)]
    rows = data_prep.rows_of_run(conversations, 22, 's', to_row, 'x')
    assert sorted(row.ids[0] for row in rows[:11]) == sorted(row.ids[0] for row in rows[11:]) == [*range(3), *range(4, 12)]
    assert rows[:11] != rows[11:] and sorted(encoded) == sorted(f'row {i}' for i in range(12))
    assert 'x: 1 of 12 rows left out' in capsys.readouterr().out
    encoded.clear()
    assert data_prep.rows_of_run(conversations, 4, 's', to_row, 'x') == rows[:4] and len(encoded) <= 5
    assert data_prep.rows_of_run(conversations, 4, 't', to_row, 'x') != rows[:4]
    with pytest.raises(SystemExit):
        data_prep.rows_of_run(conversations[3:4], 4, 's', to_row, 'x')
    assert 'x: no rows left of 1' in capsys.readouterr().err


@pytest.mark.parametrize('layers, benign, words', [
    ([0.5, 0.16], 0.98, 'rerouted: cos 0.33 on 2 held-out harmful rows, 0.98 on 3 benign'), ([0.98, 0.98], 0.99, 'warning: NOT rerouted: cos 0.98'),
    ([0.99, -0.21], 0.99, 'warning: NOT rerouted: cos 0.39 on 2 held-out harmful rows, 0.99 on 3 benign; harmful states: 0.99 at layer 1, -0.21 at layer 2'),
    ([0.1, 0.1], 0.5, 'warning: rerouted, but benign states moved too: cos 0.10'), ([0.1, math.nan], 0.99, 'warning: NOT rerouted: cos nan'),
    ([0.1, 0.1], math.nan, 'warning: rerouted, but benign states moved too')])
def test_the_verdict_says_whether_the_states_of_held_out_rows_moved_at_each_layer(layers, benign, words):
    streams = [types.SimpleNamespace(name=name, held_out=[0] * n) for name, n in (('retain', 3), ('harmful', 2))]
    record = {'val_cb_cos': sum(layers) / 2, 'val_retain_cos': benign, 'val_cb_cos_1': layers[0], 'val_cb_cos_2': layers[1]}
    record |= {'step': 149, 'retain_coeff': 5, 'cb_coeff': 5}
    assert cb_train.verdict(record, streams).startswith(words)
    assert 'schedule_steps=300' not in cb_train.verdict(record, streams)
    undone = cb_train.verdict({**record, 'retain_coeff': 9.9, 'cb_coeff': 0.1}, streams)  # the schedule took back what it had done
    assert ('below 0.7 wanted: schedule_steps=300' in undone) == ('NOT' in words)


def test_a_run_that_does_nothing_says_so_at_a_fifth_of_its_steps_and_everywhere_at_its_end(run, arguments, tmp_path):
    status, out, err = run('cb_train.py', *arguments, '--learning_rate=1e-12', '--max_steps=10')
    assert status == 0 and 'warning: by step 2 the cb loss has not moved a tenth' in err
    found = out.strip().splitlines()[-1]
    assert found.startswith('warning: NOT rerouted: cos 1.00 on 1 held-out harmful rows, 1.00 on 2 benign')
    assert json.load(open(tmp_path / 'out' / 'cb_config.json'))['verdict'] == found
    assert json.loads(open(tmp_path / 'out' / 'log.jsonl').readlines()[-1])['verdict'] == found
    assert found in (tmp_path / 'out' / 'README.md').read_text()


def test_without_val_data_path_a_tenth_of_both_sets_is_held_out_of_the_training(run, arguments, tmp_path):
    status, out, err = run('cb_train.py', *arguments, '--val_data_path=', '--max_steps=8')
    assert status == 0, err
    assert 'retain: 9 rows are read, 1 held out' in out and 'harmful: 10 rows are read, 2 held out' in out


def scaled_dir(path, factor, sink=0.0):
    """
    The tiny model with all its states so many times as large: its embedding, and all that writes to the stream, is scaled. With a sink,
    BOS has that much in the last dimension, which nothing else holds, writes or reads.
    """
    make_model_dir(path, shard='1GB', config=LlamaConfig(**SHAPE | dict(rms_norm_eps=1e-12)))
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(('embed_tokens.weight', 'o_proj.weight', 'down_proj.weight')):
                p *= factor
                if sink:
                    p[..., -1] = 0
                    p[-1] = 0 if 'embed' not in name else p[-1]
            elif sink and 'norm' in name:
                p[-1] = 0
        if sink:
            model.model.embed_tokens.weight[2, -1] = sink
    model.save_pretrained(path)
    return str(path)


def test_a_model_whose_states_are_ten_or_a_thousand_times_as_large_trains_to_the_same_curve(run, arguments, tmp_path):
    curves = {}
    for factor in (1, 10, 1000):
        base = scaled_dir(tmp_path / f'base{factor}', factor)
        more = [f'--model_name={base}', f'--output_dir={tmp_path / str(factor)}', '--lora_dropout=0', '--max_steps=10', '--learning_rate=3e-3']
        status, _, err = run('cb_train.py', *arguments, *more)
        assert status == 0, err
        records = [json.loads(line) for line in open(tmp_path / str(factor) / 'log.jsonl')]
        curves[factor] = [record[key] for record in records for key in ('retain_loss', 'cb_loss', 'grad_norm')]
        assert records[-1]['cb_loss'] < 0.9
    assert curves[10] == pytest.approx(curves[1], rel=1e-3) and curves[1000] == pytest.approx(curves[1], rel=1e-3)


def test_a_first_token_with_a_norm_of_25000_neither_dominates_nor_stops_a_run(run, arguments, tmp_path):
    base = scaled_dir(tmp_path / 'base', 1, 25000.0)
    states = AutoModelForCausalLM.from_pretrained(base)(torch.tensor([[2, 4, 7]]), output_hidden_states=True).hidden_states
    assert states[2][0, 0].norm() > 24000 > 100 > states[2][0, 1].norm()
    status, out, err = run('cb_train.py', *arguments, f'--model_name={base}', '--lora_dropout=0', '--max_steps=10', '--learning_rate=3e-3')
    assert status == 0, err
    records = [json.loads(line) for line in open(tmp_path / 'out' / 'log.jsonl')]
    assert records[0]['cb_loss'] > 0.99 and records[-1]['cb_loss'] < 0.9 and max(r['retain_loss'] for r in records) < 3 * 8.7


def test_a_date_that_the_template_writes_is_frozen_and_kept_by_a_resumed_run(run, arguments, tmp_path, monkeypatch):
    template = tmp_path / 'dated.jinja'
    template.write_text("{{ bos_token }}{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ ' <' + m.role + '> ' + m.content + ' <end>' }}"
                        "{% endfor %}{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}")
    dated = [*arguments, f'--chat_template={template}']

    def full(*_, **__):
        raise OSError(28, 'No space left on device')
    with monkeypatch.context() as patch:
        patch.setattr('shutil.copytree', full)
        assert run('cb_train.py', *dated, '--date=2026-01-31')[0] == 1
    status, out, err = run('cb_train.py', *dated, '--resume=True')  # on another day
    assert status == 0 and "date = '2026-01-31'" in out, err
    assert json.load(open(tmp_path / 'out' / 'cb_config.json'))['date'] == '2026-01-31'
    status, _, err = run('cb_train.py', *dated, '--date=31.1.2026', f'--output_dir={tmp_path / "no"}')
    assert status == 2 and err.count('\n') == 1 and 'date' in err


def test_a_run_writes_an_ordinary_model_equal_to_base_plus_peft_adapter_and_touches_nothing_else(run, arguments, model_dir, tmp_path):
    out = tmp_path / 'out'
    status, text, err = run('cb_train.py', *arguments, '--lora_start=0')
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
    assert [r['step'] for r in records] == [0, 1, 2, 3] and records[0]['retain_loss'] == 0
    assert records[0]['cb_loss'] == pytest.approx(1, abs=1e-5)
    assert set(records[1]) == {'step', 'loss', 'retain_loss', 'cb_loss', 'retain_coeff', 'cb_coeff', 'retain_cos', 'cb_cos', 'learning_rate',
                               'grad_norm', 'seconds', 'tokens'}
    assert {'val_retain_loss', 'val_cb_loss', 'val_retain_cos', 'val_cb_cos'} <= set(records[2]) and records[3]['cb_cos'] < 1
    saved = json.load(open(out / 'cb_config.json'))
    assert saved['target_layers'] == [2] and saved['versions']['torch'] == torch.__version__
    status, _, err = run('cb_train.py', *arguments)
    assert status == 2 and 'overwrite' in err
    assert run('cb_train.py', *arguments, '--overwrite=True', '--max_steps=1')[0] == 0
    assert len(open(out / 'log.jsonl').readlines()) == 1


def peft_adapter(path, model_dir, modules, dropout=0.0, layers=(0, 1, 2)):
    """An adapter with a B that is not zero, written by peft itself. Returns its folder."""
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(1)  # before peft draws lora_A
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), LoraConfig(
        r=4, lora_alpha=8, target_modules=modules, lora_dropout=dropout, layers_to_transform=list(layers), layers_pattern='layers', task_type='CAUSAL_LM'))
    for name, parameter in model.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    return str(path)


def tensors_of(folder):
    return {k: v for name in data_prep.weight_files(str(folder)) for k, v in load_file(f'{folder}/{name}').items()}


MOE = dict(num_experts_per_tok=2, moe_intermediate_size=24)
FAMILIES = {  # name: (config, dtype, target modules)
    'llama2': (lambda: LlamaConfig(**SHAPE | dict(num_key_value_heads=4)), torch.float32, ATTENTION),
    'llama3 tied': (lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters={
        'rope_type': 'llama3', 'rope_theta': 5e5, 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
        'original_max_position_embeddings': 64}), torch.bfloat16, ATTENTION),
    'mistral': (lambda: transformers.MistralConfig(**SHAPE, sliding_window=None), torch.bfloat16, ATTENTION),
    'mistral sliding': (lambda: transformers.MistralConfig(**SHAPE, sliding_window=4), torch.float32, ATTENTION),
    'qwen2 sliding': (lambda: transformers.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=2), torch.float32, ATTENTION),
    'qwen2.5 tied': (lambda: transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True), torch.bfloat16, ATTENTION),
    'qwen3 tied': (lambda: transformers.Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True), torch.float32, ATTENTION),
    'gemma2 tied': (lambda: transformers.Gemma2Config(**SHAPE, head_dim=8, sliding_window=4), torch.float32, ATTENTION),
    'gemma3 tied': (lambda: transformers.Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=4, layer_types=[
        'sliding_attention', 'full_attention'] * 2), torch.bfloat16, ATTENTION),
    'olmo2': (lambda: transformers.Olmo2Config(**SHAPE), torch.float32, ATTENTION),
    'smollm3 tied': (lambda: transformers.SmolLM3Config(**SHAPE, no_rope_layers=[1, 0, 1, 0], tie_word_embeddings=True), torch.float32, ATTENTION),
    'granite': (lambda: transformers.GraniteConfig(**SHAPE, embedding_multiplier=2.0, residual_multiplier=0.5), torch.float32, ATTENTION),
    'mixtral': (lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1), torch.float32, ATTENTION),
    'qwen3 moe': (lambda: transformers.Qwen3MoeConfig(**SHAPE, head_dim=8, num_experts=4, **MOE), torch.float32, ATTENTION),
    'phi3 fused': (lambda: transformers.Phi3Config(**SHAPE), torch.bfloat16, ['qkv_proj', 'o_proj']),
    'qwen2 moe sliding': (lambda: transformers.Qwen2MoeConfig(**SHAPE, num_experts=4, use_sliding_window=True, sliding_window=4,
                                                              max_window_layers=4, shared_expert_intermediate_size=24, **MOE),
                          torch.float32, ATTENTION),
    'stablelm': (lambda: transformers.StableLmConfig(**SHAPE), torch.float32, ATTENTION),
    'gpt-neox': (lambda: transformers.GPTNeoXConfig(**SHAPE), torch.float32, ['query_key_value', 'dense']),
    'phi': (lambda: transformers.PhiConfig(**SHAPE), torch.float32, ['q_proj', 'k_proj', 'v_proj', 'dense']),
    'llama seven modules': (lambda: LlamaConfig(**SHAPE), torch.float32, ATTENTION + ['gate_proj', 'up_proj', 'down_proj'])}


@pytest.mark.parametrize('family', FAMILIES)
def test_a_family_computes_padded_rows_as_transformers_does_learns_and_merges_as_peft_does(run, arguments, tmp_path, family):
    from peft import PeftModel
    make, dtype, modules = FAMILIES[family]
    base = make_model_dir(tmp_path / 'base', dtype, '20KB', make())
    assert len(data_prep.weight_files(base)) >= 2
    model = cb_train.load_decoder(base, 3, 'auto', 'cpu')
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation=model.config._attn_implementation).eval()
    loras = cb_train.add_lora(model, modules, [0, 1, 2], 4, 8, 0.0)
    rows = [[2, 4, 7, 8, 9, 3, 5, 10, 11, 12, 13, 3], [2, 12, 4, 4, 9, 8, 7], [2, 6], [2]]  # two longer than a sliding window
    ids, mask = cb_train.pad(counted(rows), 'cpu')
    h, _ = cb_train.reference_and_adapted(model, loras, ids)
    for b, row in enumerate(rows):  # right-padded beside others, without an attention mask, as transformers' own alone
        with torch.no_grad():
            want = whole(torch.tensor([row]), output_hidden_states=True, use_cache=False).hidden_states
        for l in (1, 2):
            assert close(h[l][b, :len(row)].float(), want[l][0].float(), 1e-5 if dtype == torch.float32 else 1e-2)
    ids = ids[:1]
    embedded = model.get_input_embeddings()(ids[0])  # Gemma's are scaled here, and what is added to them with them
    assert torch.equal(cb_train.input_embeddings(model)[ids[0]], embedded)
    assert family != 'gemma3 tied' or not close(embedded.float(), model.get_input_embeddings().weight[ids[0]].float(), 1.0)

    start = peft_adapter(tmp_path / 'start', base, modules)
    status, _, err = run('cb_train.py', *arguments, f'--model_name={base}', f'--init_from={start}', f'--target_modules={",".join(modules)}',
                         '--lora_dropout=0', '--use_dynamic_scheduling=False', '--batch_size=10', '--num_cb_examples=10', '--max_steps=3')
    assert status == 0, err
    losses = [json.loads(line)['loss'] for line in open(tmp_path / 'out' / 'log.jsonl')]
    assert losses[2] < losses[0]
    twin = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / 'out' / 'adapter').eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / 'out', dtype=torch.float32).eval()
    with torch.no_grad():
        a, b = merged(ids).logits, twin(ids).logits
    assert (a - b).abs().max() <= (1e-4 if dtype == torch.float32 else 0.05 * b.abs().max())
    before, after = tensors_of(base), tensors_of(tmp_path / 'out')
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and len(changed) == 3 * len(modules)
    assert all(name.split('.')[-2] in modules and int(name.split('.layers.')[1][0]) < 3 for name in changed)
    plain = twin.merge_and_unload().state_dict()
    assert all(close(after[name].float(), plain[name].to(dtype).float(), 1e-5 if dtype == torch.float32 else 1e-3) for name in changed)


@pytest.mark.parametrize('kind, words', [
    ('gpt2', ['GPT2Model', 'another way']), ('bert', ['BertModel']), ('t5', ['no causal language model']), ('quantised', ['quantised']),
    ('gemma3', ['multimodal'])])
def test_a_model_that_cannot_work_is_one_line_that_says_why(run, arguments, tmp_path, kind, words):
    config = {'gpt2': lambda: transformers.GPT2Config(n_layer=4, n_embd=32, n_head=4), 'bert': lambda: transformers.BertConfig(num_hidden_layers=4),
              't5': transformers.T5Config, 'quantised': lambda: LlamaConfig(**SHAPE), 'gemma3': transformers.Gemma3Config}[kind]()
    config.save_pretrained(tmp_path / 'model')
    if kind == 'quantised':
        path = tmp_path / 'model' / 'config.json'
        path.write_text(json.dumps({**json.loads(path.read_text()), 'quantization_config': {'quant_method': 'gptq', 'bits': 4}}))
    status, _, err = run('cb_train.py', *arguments, f'--model_name={tmp_path / "model"}')
    assert status == 2 and err.count('\n') == 1 and all(word in err for word in words), err


def published_losses(model_dir, adapter, retain, harmful, divisor, relative, blocks=3, target=2, positions=512, head=2):
    """The equations by peft and transformers alone, on lists of id lists: (retain_loss, cb_loss). The head of a row counts in retain alone."""
    from peft import PeftModel
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), adapter).eval()
    sums = torch.zeros(3)
    for kind, rows in ((0, retain), (1, harmful)):
        for row in rows:  # one at a time: no padding at all
            inputs = dict(input_ids=torch.tensor([row]), output_hidden_states=True, use_cache=False)
            with torch.no_grad():
                h_lora = list(whole(**inputs).hidden_states[:blocks + 1])
                with whole.disable_adapter():
                    h = list(whole(**inputs).hidden_states[:blocks + 1])
                norm = whole.get_base_model().model.norm  # a model cut after its third block ends with the norm
                h[blocks], h_lora[blocks] = norm(h[blocks]), norm(h_lora[blocks])
            if kind == 0:
                unit = [a.norm(dim=-1) / 8.7 if relative else 1 for a in h]
                sums[0] += sum(((b - a).norm(dim=-1) / u).sum() for a, b, u in zip(h[1:], h_lora[1:], unit[1:]))
            else:
                sums[1] += torch.cosine_similarity(h_lora[target], h[target], dim=-1)[0, head:].relu().sum()
                sums[2] += len(row) - head
    real = sum(map(len, retain))
    retain_sum = sums[0] / (blocks * real if divisor == 'real' else (blocks + 1) * len(retain) * positions)
    return retain_sum.item(), (sums[1] / sums[2]).item()


@pytest.mark.parametrize('divisor, accumulation, distance', [
    ('real', 1, 'absolute'), ('real', 4, 'relative'), ('published', 1, 'absolute'), ('published', 4, 'absolute')])
def test_the_first_steps_losses_are_those_of_peft_and_transformers(run, arguments, model_dir, rows, tmp_path, divisor, accumulation, distance):
    start = peft_adapter(tmp_path / 'start', model_dir, ATTENTION)
    retain, harmful = [json.loads(line) for line in open(rows['retain'])][:8], json.load(open(rows['cb']))[:8]
    (tmp_path / 'retain8.jsonl').write_text('\n'.join(map(json.dumps, retain)))
    (tmp_path / 'cb8.json').write_text(json.dumps(harmful))
    status, _, err = run('cb_train.py', *arguments, f'--init_from={start}', f'--retain_data_path={tmp_path / "retain8.jsonl"}',
                         f'--cb_data_path={tmp_path / "cb8.json"}', f'--batch_size={8 // accumulation}', f'--retain_divisor={divisor}',
                         f'--gradient_accumulation_steps={accumulation}', f'--retain_distance={distance}', '--lora_dropout=0', '--max_steps=1')
    assert status == 0, err
    template = AutoTokenizer.from_pretrained(model_dir).apply_chat_template
    retain = [template(row['messages'], return_dict=False) for row in retain]
    harmful = [template([{'role': 'user', 'content': row['prompt']}, {'role': 'assistant', 'content': row['response']}], return_dict=False)
               for row in harmful]
    assert len(set(map(len, retain))) > 1
    record = json.loads(open(tmp_path / 'out' / 'log.jsonl').readline())
    want = published_losses(model_dir, start, retain, harmful, divisor, distance == 'relative')
    assert (record['retain_loss'], record['cb_loss']) == pytest.approx(want, rel=1e-5)
    assert record['retain_loss'] > 0 and record['cb_loss'] < 0.999


def test_an_adapter_of_ours_or_pefts_is_merged_alone_and_one_that_does_not_fit_is_refused(run, arguments, model_dir, tmp_path):
    from peft import PeftModel
    start = peft_adapter(tmp_path / 'start', model_dir, ATTENTION)
    assert run('cb_train.py', *arguments, f'--init_from={start}', '--merge_only=True', '--cb_data_path=none')[0] == 0
    twin = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), start).merge_and_unload().state_dict()
    assert all(torch.allclose(tensor, twin[name], atol=1e-6) for name, tensor in tensors_of(tmp_path / 'out').items())
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert 'merged the adapter' in card and 'max_steps' not in card
    bare = shutil.copytree(model_dir, tmp_path / 'bare', ignore=shutil.ignore_patterns('tokenizer*', 'chat_template*'))
    assert run('cb_train.py', *arguments, f'--model_name={bare}', f'--init_from={start}', '--merge_only=True', f'--output_dir={tmp_path / "merged"}')[0] == 0
    status, _, err = run('cb_train.py', *arguments, f'--init_from={start}', '--merge_only=True', '--chat_template=none.jinja', f'--output_dir={tmp_path / "no"}')
    assert status == 2 and err.count('\n') == 1 and 'none.jinja' in err
    assert run('cb_train.py', *arguments, f'--init_from={tmp_path / "out" / "adapter"}', f'--output_dir={tmp_path / "again"}', '--merge_only=True')[0] == 0
    assert all(torch.equal(tensor, tensors_of(tmp_path / 'again')[name]) for name, tensor in tensors_of(tmp_path / 'out').items())
    status, _, err = run('cb_train.py', *arguments, f'--init_from={start}', f'--output_dir={tmp_path / "on"}', '--learning_rate=1e-12')
    assert status == 0, err  # trained on, its deltas in units of their weights, it is still what it was
    theirs, ours = (load_file(f'{folder}/adapter_model.safetensors') for folder in (start, tmp_path / 'on' / 'adapter'))
    assert all(torch.allclose(ours[name], tensor, atol=1e-6) for name, tensor in theirs.items())
    for more, word in ((['--lora_r=8'], 'r=4'), (['--lora_alpha=4'], 'lora_alpha=8'), (['--target_modules=q_proj'], 'target_modules'),
                       (['--layers_to_transform=0,1'], 'layers_to_transform'), ([f'--init_from={tmp_path}'], 'adapter_config.json'),
                       (['--merge_adapter=False', '--merge_only=True'], 'merge_only')):
        status, _, err = run('cb_train.py', *arguments, f'--init_from={start}', f'--output_dir={tmp_path / "no"}', *more)
        assert status == 2 and err.count('\n') == 1 and word in err and not (tmp_path / 'no').exists(), err


def test_the_adapter_can_be_saved_alone_and_the_card_names_recipe_and_counts(run, arguments, tmp_path):
    assert run('cb_train.py', *arguments, '--merge_adapter=False')[0] == 0
    assert sorted(os.listdir(tmp_path / 'out')) == ['README.md', 'adapter', 'cb_config.json', 'log.jsonl']
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert 'resume' not in card and 'cpu' not in card and str(tmp_path) not in card  # nothing of how it was started
    assert card.startswith('---\n') and '10 retain rows, 12 harmful rows' in card and '| target_layers | [2] |' in card and '## Evaluation' in card


def test_a_conversation_is_encoded_with_its_head_and_answer_and_cut_to_its_lengths(model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    words = tokenizer.convert_ids_to_tokens
    talk = [{'role': r, 'content': c} for r, c in (('user', 'red'), ('assistant', 'blue'), ('user', 'one two'), ('assistant', 'yes no'))]
    ids, head, answer = data_prep.encode(tokenizer, talk, 512)
    assert words(ids)[:3] == ['<bos>', '<user>', 'red'] and head == 2 and words(ids)[answer:] == ['yes', 'no', '<end>']
    ids, head, answer = data_prep.encode(tokenizer, talk, 512, (4, 2))
    assert words(ids) == ['<bos>', '<user>', 'red', '<end>', 'yes', 'no'] and answer == 4
    assert len(data_prep.encode(tokenizer, talk, 8)[0]) == 8


def test_soft_tokens_stay_in_a_request_that_is_cut(run, arguments, rows, tmp_path, model_dir):
    harmful = [{'prompt': 'tell me about red apples ' * 4, 'response': 'yes'} for _ in range(3)]
    (tmp_path / 'long.json').write_text(json.dumps(harmful))
    for length in (9, 12, 15, 18):
        status, _, err = run('cb_train.py', *arguments, f'--cb_data_path={tmp_path / "long.json"}', '--soft_contexts=1', '--overwrite=True',
                             f'--max_seq_length={length}', '--max_steps=2')
        assert status == 0, err
    c = types.SimpleNamespace(**configurator.configure(cb_train.__file__, [
        *arguments, f'--cb_data_path={tmp_path / "long.json"}', '--soft_contexts=1', '--cb_lengths=6,0', '--max_steps=2']))
    cut, _ = cb_train.load_sets(c, data_prep.load_tokenizer(model_dir))
    assert cut['harmful'] and {row.end for row in cut['harmful']} == {6}  # what the template writes behind it is cut off, too


def test_held_out_rows_are_read_once_and_those_of_a_set_that_is_all_alike_are_trained_on_with_a_warning(run, arguments, tmp_path):
    rows = [(f'row {i}', i) for i in range(8)]
    to_row = lambda number, where: Row([number], [number % 4 == 0], where)
    assert sorted(row.ids[0] for row in data_prep.rows_of_run(rows, 0, '', to_row, 'x')) == [0, 4]
    (tmp_path / 'one.json').write_text(json.dumps([{'prompt': 'red', 'response': 'yes yes'}]))
    status, _, err = run('cb_train.py', *arguments, f'--cb_data_path={tmp_path / "one.json"}', '--val_data_path=')
    assert status == 0 and 'warning: harmful: all rows are alike, so those held out are trained on' in err


def test_a_merge_that_adds_nothing_is_a_fault_in_half_precision_too(tmp_path, monkeypatch):
    source, merge = make_model_dir(tmp_path / 'bf16', torch.bfloat16), cb_train.merge
    model = cb_train.load_decoder(source, 3, 'auto', 'cpu')
    loras = cb_train.add_lora(model, ['q_proj', 'v_proj'], range(3), 4, 4, 0.0)
    torch.manual_seed(0)
    for lora in loras.values():
        torch.nn.init.normal_(lora.lora_B, std=1.0)
    probe = torch.arange(32)[None] % 16
    with torch.no_grad():
        frozen, adapted = cb_train.reference_and_adapted(model, loras, probe)
    c = types.SimpleNamespace(dtype='auto', device='cpu', fsdp=False, chat_template='')
    arguments = source, str(tmp_path / 'merged'), loras, probe, frozen, adapted, 3, cb_train.base_files(source), c
    assert cb_train.save_merged(*arguments) < 0.05
    monkeypatch.setattr(cb_train, 'merge', lambda model_dir, output_dir, deltas: merge(model_dir, output_dir, {}))
    with pytest.raises(SystemExit) as stop:
        cb_train.save_merged(*arguments)
    assert 'away from the adapted one: not moved' in str(stop.value)
    broken = lambda model_dir, output_dir, deltas: merge(model_dir, output_dir, {name: lambda rows: torch.tensor(math.nan) for name in deltas})
    monkeypatch.setattr(cb_train, 'merge', broken)
    with pytest.raises(SystemExit) as stop:
        cb_train.save_merged(*arguments)
    assert 'is nan away from the adapted one' in str(stop.value)


def test_a_base_that_may_only_be_read_is_merged_into_a_folder_that_may_be_written(model_dir, tmp_path):
    base = shutil.copytree(model_dir, tmp_path / 'base')
    base.chmod(0o555)
    cb_train.merge(str(base), tmp_path / 'merged', {'layers.0.self_attn.q_proj': lambda rows: torch.zeros(1)})
    assert (tmp_path / 'merged').stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize('divisor', ['real', 'published'])
def test_a_validation_divides_as_a_step_does(run, arguments, rows, tmp_path, divisor):
    (tmp_path / 'retain3.jsonl').write_text(''.join(open(rows['retain']).readlines()[:3]))
    (tmp_path / 'val3.jsonl').write_text('\n'.join([
        *(json.dumps({'label': 'benign', **json.loads(line)}) for line in open(tmp_path / 'retain3.jsonl')),
        '{"label": "harmful", "prompt": "red", "response": "yes"}']))
    status, _, err = run('cb_train.py', *arguments, f'--retain_data_path={tmp_path / "retain3.jsonl"}', f'--val_data_path={tmp_path / "val3.jsonl"}',
                         f'--retain_divisor={divisor}', '--max_steps=1', '--learning_rate=1e-12', '--lora_dropout=0')
    assert status == 0, err
    record, = records_of(tmp_path / 'out')
    assert record['val_retain_loss'] == pytest.approx(record['retain_loss'], rel=1e-4)


def test_float16_keeps_gradients_that_are_too_small_for_it(run, arguments, tmp_path):
    norms = {}
    for dtype in ('float16', 'float32'):
        status, _, err = run('cb_train.py', *arguments, f'--dtype={dtype}', f'--output_dir={tmp_path / dtype}', '--lorra_alpha=2e-4', '--max_steps=1')
        assert status == 0, err
        norms[dtype] = records_of(tmp_path / dtype)[0]['grad_norm']
    assert norms['float16'] == pytest.approx(norms['float32'], rel=0.05)


def test_a_row_of_ten_thousand_words_is_cut(run, arguments, rows, tmp_path):
    with open(rows['retain'], 'a') as f:
        f.write('\n' + json.dumps({'prompt': 'red', 'response': 'blue ' * 10000}))
    status, _, err = run('cb_train.py', *arguments, '--max_steps=4', '--max_seq_length=32', '--learning_rate=1e-6')
    assert status == 0, err
    assert json.loads(open(tmp_path / 'out' / 'log.jsonl').readlines()[-1])['tokens'] < 4 * 6 * 32


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
    cb_train.merge(source, tmp_path / 'merged', {'layers.1.self_attn.q_proj': lambda rows: delta[rows]})
    before, after, key = tensors_of(source), tensors_of(tmp_path / 'merged'), 'model.layers.1.self_attn.q_proj.weight'
    assert torch.equal(after.pop(key), (before.pop(key).float() + delta).bfloat16())
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_a_bfloat16_checkpoint_can_be_trained_in_float32_and_is_still_stored_in_bfloat16(run, arguments, tmp_path):
    base = make_model_dir(tmp_path / 'bf16', torch.bfloat16)
    status, _, err = run('cb_train.py', *arguments, f'--model_name={base}', '--dtype=float32')
    assert status == 0, err
    assert {tensor.dtype for tensor in tensors_of(tmp_path / 'out').values()} == {torch.bfloat16}


def test_the_adversary_moves_the_context_of_a_bfloat16_model(run, arguments, tmp_path):
    base = make_model_dir(tmp_path / 'bf16', torch.bfloat16)
    status, _, err = run('cb_train.py', *arguments, f'--model_name={base}', '--soft_contexts=0.5', '--loss_on=harmful_response')
    assert status == 0, err
    assert len(records_of(tmp_path / 'out')) == 4


@pytest.fixture
def interrupted(run, arguments, monkeypatch):
    """A run that was trained to its end and could not merge: the disk was full. Its arguments; output_dir.partial holds its checkpoint."""
    def full(*_, **__):
        raise OSError(28, 'No space left on device')
    with monkeypatch.context() as patch:
        patch.setattr('shutil.copytree', full)
        status, _, err = run('cb_train.py', *arguments)
    assert status == 1 and err.count('\n') == 1 and 'the disk is full' in err, err
    return arguments


def test_a_resumed_run_ends_as_if_nothing_had_happened(run, interrupted, tmp_path):
    assert run('cb_train.py', *interrupted, f'--output_dir={tmp_path / "whole"}')[0] == 0
    status, out, err = run('cb_train.py', *interrupted, '--resume=True')
    assert status == 0 and 'resumed at step 4' in out, err
    ours, theirs = tensors_of(tmp_path / 'out'), tensors_of(tmp_path / 'whole')
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    assert sorted(os.listdir(tmp_path / 'out')) == sorted(os.listdir(tmp_path / 'whole')) and not (tmp_path / 'out.partial').exists()


def test_a_checkpoint_holds_no_random_state_because_dropout_is_a_function_of_seed_rank_and_step(run, interrupted, tmp_path):
    saved = cb_train.read_checkpoint(tmp_path / 'out.partial' / cb_train.CHECKPOINT)
    assert set(saved) == {'state', 'parameters', 'optimizer'} and {name[-6:] for name in saved['parameters']} == {'lora_A', 'lora_B'}
    assert set(saved['state']) == {'options', 'rows', 'base', 'step', 'tokens', 'seconds', 'log_bytes', 'record', 'first_cb_loss'}
    assert all(set(one) == {'step', 'exp_avg', 'exp_avg_sq'} for one in saved['optimizer']['state'].values())


def test_killed_signalled_and_out_of_disk_a_run_resumes_to_the_same_bytes(tmp_path, capsys):
    stress.main(kills=6, disks=6, seed=0, folder=str(tmp_path))  # a SystemExit with its reason if an end differs
    out = capsys.readouterr().out
    assert 'every end identical' in out and 'every earlier output whole' in out


@pytest.mark.parametrize('more, words', [
    (['--max_steps=5'], ['max_steps=5 (was 4)']), (['--learning_rate=0.1', '--seed=3'], ['learning_rate', 'seed']), (['--num_cb_examples=9'], ['the rows changed'])])
def test_resuming_another_run_is_refused_with_what_differs(run, interrupted, tmp_path, more, words):
    before = (tmp_path / 'out.partial' / cb_train.CHECKPOINT).read_bytes()
    status, _, err = run('cb_train.py', *interrupted, '--resume=True', *more)
    assert status == 2 and err.count('\n') == 1 and all(word in err for word in words), err
    assert (tmp_path / 'out.partial' / cb_train.CHECKPOINT).read_bytes() == before
    status, _, err = run('cb_train.py', *interrupted)
    assert status == 2 and '--resume=True to go on' in err


@pytest.mark.parametrize('damage', [lambda data: data[:-40], lambda data: b'\xff' * 50, lambda data: b''])
def test_a_broken_checkpoint_is_named(run, interrupted, tmp_path, damage):
    path = tmp_path / 'out.partial' / cb_train.CHECKPOINT
    path.write_bytes(damage(path.read_bytes()))
    status, _, err = run('cb_train.py', *interrupted, '--resume=True')
    assert status == 2 and cb_train.CHECKPOINT in err and 'corrupt' in err and err.count('\n') == 1


@pytest.mark.parametrize('name, damage', [
    ('model-00001-of-00005.safetensors', lambda data: data[:-8]), ('model-00002-of-00005.safetensors', lambda data: b'\x00' * 5),
    ('model.safetensors.index.json', lambda data: data[:-30]), ('model.safetensors.index.json', lambda data: b'[]'),
    ('model.safetensors.index.json', lambda data: b'{"weight_map": {"a": "../escape.safetensors"}}'), ('config.json', lambda data: b'{"')])
def test_a_broken_base_is_named_before_anything_is_loaded(run, arguments, model_dir, tmp_path, name, damage):
    shutil.copytree(model_dir, tmp_path / 'base')
    path = tmp_path / 'base' / name
    path.write_bytes(damage(path.read_bytes()))
    status, _, err = run('cb_train.py', *arguments, f'--model_name={tmp_path / "base"}')
    assert status == 2 and (name if 'escape' not in err else 'escape') in err and err.count('\n') == 1 and not (tmp_path / 'out.partial').exists(), err


def test_a_base_that_changed_since_the_training_is_not_merged(run, arguments, model_dir, tmp_path, monkeypatch):
    shutil.copytree(model_dir, tmp_path / 'base')
    real = torch.optim.AdamW.step

    def touched(*more, **named):
        os.utime(tmp_path / 'base' / 'config.json', (1, 1))
        return real(*more, **named)
    monkeypatch.setattr(torch.optim.AdamW, 'step', touched)
    status, _, err = run('cb_train.py', *arguments, f'--model_name={tmp_path / "base"}')
    assert status == 1 and 'config.json has changed' in err and not (tmp_path / 'out').exists()


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_rows(run, arguments, rows, tmp_path):
    status, _, err = run('cb_train.py', *arguments, '--learning_rate=1e30')
    assert status == 1 and 'step 1' in err and f'{rows["retain"]}: row ' in err and 'the last checkpoint is kept' in err and 'plums' not in err, err
    saved = cb_train.read_checkpoint(tmp_path / 'out.partial' / cb_train.CHECKPOINT)
    moments = [one for state in saved['optimizer']['state'].values() for one in state.values()]
    assert all(tensor.isfinite().all() for tensor in [*saved['parameters'].values(), *moments])


def test_a_second_run_on_the_same_output_is_refused(run, arguments, tmp_path):
    (tmp_path / 'out.partial').mkdir()
    (tmp_path / 'out.partial' / 'log.jsonl').touch()
    with filelock.FileLock(tmp_path / 'out.partial' / 'lock'):
        status, _, err = run('cb_train.py', *arguments, '--overwrite=True')
    assert status == 2 and 'another run' in err and err.count('\n') == 1
    assert run('cb_train.py', *arguments, '--max_steps=1', '--overwrite=True')[0] == 0


def test_a_linked_output_keeps_the_link_and_a_file_in_its_place_is_refused(run, arguments, tmp_path):
    (tmp_path / 'disk \u00e9 x').mkdir()
    (tmp_path / 'out').symlink_to(tmp_path / 'disk \u00e9 x')
    assert run('cb_train.py', *arguments, '--max_steps=1')[0] == 0
    assert (tmp_path / 'out').is_symlink() and (tmp_path / 'disk \u00e9 x' / 'cb_config.json').exists()
    (tmp_path / 'file').write_text('mine')
    for name in ('file', 'file/below'):
        status, _, err = run('cb_train.py', *arguments, f'--output_dir={tmp_path / name}', '--overwrite=True')
        assert status == 2 and err.count('\n') == 1 and (tmp_path / 'file').read_text() == 'mine', err


@pytest.mark.parametrize('more, words', [
    (['--target_layers=9'], ['target_layers=[9]', '4 blocks', '--target_layers=1,2']), (['--target_layers=0'], ['target_layers']),
    (['--target_layers=3', '--num_hidden_layers=2'], ['target_layers=[3]', 'keeps 2 blocks']),
    (['--layers_to_transform=3'], ['layers_to_transform=[3]', '0 to 2']), (['--num_hidden_layers=9'], ['num_hidden_layers=9', '4 blocks']),
    (['--target_modules=qq_proj'], ['qq_proj', 'q_proj']), (['--target_modules=self_attn.q_proj'], ["'self_attn.q_proj'", 'q_proj']), (['--cb_data_path=none.json'], ['none.json', 'no such file']),
    (['--model_name=none/such/model'], ['none/such/model']), (['--lora_dropout=1'], ['lora_dropout']), (['--max_steps=0'], ['max_steps=0']),
    (['--device=tpu'], ['device=tpu']), (['--device=cuda:x'], ['device=cuda:x']), (['--dtype=int8'], ['dtype=int8']),
    (['--gradient_checkpointing=maybe'], ['True or False']), (['--max_setps=3'], ['did you mean max_steps']),
    (['--retain_data_path=no/set'], ['no/set']), (['--target_layers='], ['target_layers']), (['--target_layers=1,1'], ['twice']),
    (['--retain_contexts='], ['empty retain_contexts']), (['--cb_lengths=4'], ['cb_lengths']), (['--contexts=own,all'], ['contexts', 'own, nothing or noise']),
    (['--broken=0.5'], ['broken=0.5', 'loss_on=harmful_response']), (['--opening=2'], ['opening=2', 'loss_on=harmful_response']), (['--soft_contexts=2'], ['soft_contexts', 'at most 1']),
    (['--soft_contexts=0.01'], ['of 3 rows a step none']), (['--soft_steps=0'], ['soft_steps']), (['--soft_tokens=0'], ['soft_tokens']),
    (['--layers_to_transform=2'], ['layers_to_transform=[2]', 'cannot move']), (['--seed=4294967296'], ['seed']), (['--learning_rate=-1'], ['learning_rate', 'more than 0']), (['--weight_decay=-1'], ['weight_decay', 'at least 0'])])
def test_a_mistake_is_one_line_and_status_2_before_anything_is_written(run, arguments, tmp_path, more, words):
    status, _, err = run('cb_train.py', *arguments, *more)
    assert status == 2 and err.count('\n') == 1 and all(word in err for word in words), err
    assert not (tmp_path / 'out').exists() and not (tmp_path / 'out.partial').exists()


def test_a_bad_row_is_named_and_not_quoted(run, arguments, rows, tmp_path):
    with open(rows['retain'], 'a') as f:
        f.write('\n{"prompt": "SECRET", "response": ""}')
    status, out, err = run('cb_train.py', *arguments)
    assert status == 2 and 'row 11' in err and 'SECRET' not in out + err and not (tmp_path / 'out.partial').exists()


def test_a_second_round_on_an_earlier_output_keeps_its_own_adapter_options_and_log(run, arguments, tmp_path):
    assert run('cb_train.py', *arguments)[0] == 0
    (tmp_path / 'out' / 'eval.json').write_text('{}')
    assert run('cb_train.py', *arguments, f'--model_name={tmp_path / "out"}', f'--output_dir={tmp_path / "two"}', '--lora_alpha=16', '--max_steps=2')[0] == 0
    assert json.load(open(tmp_path / 'two' / 'cb_config.json'))['max_steps'] == 2 and len(open(tmp_path / 'two' / 'log.jsonl').readlines()) == 2
    assert json.load(open(tmp_path / 'two' / 'adapter' / 'adapter_config.json'))['lora_alpha'] == 16 and not (tmp_path / 'two' / 'eval.json').exists()


def test_nothing_that_no_run_wrote_is_removed_and_an_output_inside_the_model_is_refused(run, arguments, model_dir, tmp_path):
    (tmp_path / 'out.old').mkdir()
    (tmp_path / 'out.old' / 'thesis.txt').write_text('mine')
    status, _, err = run('cb_train.py', *arguments)
    assert status == 2 and 'out.old' in err and (tmp_path / 'out.old' / 'thesis.txt').read_text() == 'mine'
    for inside in (model_dir, f'{model_dir}/out/x'):
        status, _, err = run('cb_train.py', *arguments, f'--output_dir={inside}', '--overwrite=True')
        assert status == 2 and err.count('\n') == 1 and not os.path.exists(f'{model_dir}/out'), err
    for outside in ('two', 'two.partial'):  # an overwritten output would take the model in it away
        shutil.copytree(model_dir, tmp_path / outside / 'base')
        (tmp_path / outside / 'log.jsonl').touch()
        status, _, err = run('cb_train.py', *arguments, f'--model_name={tmp_path / outside / "base"}', f'--output_dir={tmp_path / "two"}', '--overwrite=True')
        assert status == 2 and err.count('\n') == 1 and (tmp_path / outside / 'base' / 'config.json').exists(), err


def test_a_folder_that_no_run_wrote_is_never_replaced_and_one_killed_before_its_first_checkpoint_is(run, arguments, tmp_path):
    (tmp_path / 'out.partial').mkdir()
    (tmp_path / 'out.partial' / 'lock').touch()
    (tmp_path / 'out').mkdir()
    for name in ('lock', 'thesis.txt'):
        (tmp_path / 'out' / name).write_text('mine')
    status, _, err = run('cb_train.py', *arguments, '--overwrite=True')
    assert status == 2 and 'choose another' in err and (tmp_path / 'out' / 'thesis.txt').read_text() == 'mine'
    (tmp_path / 'out' / 'thesis.txt').unlink()
    status, _, err = run('cb_train.py', *arguments)
    assert status == 0, err


def test_a_static_schedule_may_stand_beside_schedule_steps(run, arguments, tmp_path):
    assert run('cb_train.py', *arguments, '--use_dynamic_scheduling=False', '--schedule_steps=9')[0] == 0
    assert {(r['retain_coeff'], r['cb_coeff']) for r in map(json.loads, open(tmp_path / 'out' / 'log.jsonl'))} == {(10.0, 10.0)}


def test_validation_wants_rows_of_both_labels(run, arguments, tmp_path):
    (tmp_path / 'val.jsonl').write_text('{"label": "benign", "prompt": "red", "response": "yes"}')
    status, _, err = run('cb_train.py', *arguments)
    assert status == 2 and 'val_data_path: harmful: no rows left of 0' in err


# ---- several ranks ----


def torchrun(ranks, *arguments):
    """Starts cb_train.py on so many gloo processes; what it prints goes to output_dir.stdout and .stderr."""
    out = next(a for a in reversed(arguments) if a.startswith('--output_dir=')).partition('=')[2]
    with open(f'{out}.stdout', 'w') as stdout, open(f'{out}.stderr', 'w') as stderr:
        return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}', 'cb_train.py', *arguments],
                                cwd=ROOT, stdout=stdout, stderr=stderr)


def forked(ranks, *arguments):
    """
    Starts cb_train.py on so many gloo processes as torchrun does, but in forks of this one, which has imported everything already: their
    process ids. What they print goes to output_dir.stdout and .stderr.
    """
    out, children = next(a for a in reversed(arguments) if a.startswith('--output_dir=')).partition('=')[2], []
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    for rank in range(ranks):
        names = {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': ranks, 'LOCAL_WORLD_SIZE': ranks, 'MASTER_ADDR': 'localhost', 'MASTER_PORT': port}
        prepare = functools.partial(os.environ.update, {name: str(value) for name, value in names.items()})
        children.append(fork_script(arguments, f'{out}.stdout', f'{out}.stderr', prepare))
    return children


def ended(children):
    """Waits for processes and returns their exit statuses."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def said(out, name='stderr'):
    """The lines that the ranks printed, without torchrun's own."""
    return [line for line in open(f'{out}.{name}').read().splitlines() if line.startswith(('error', 'fault', 'SIG', 'step', 'rank '))]


def records_of(out):
    return [{key: value for key, value in json.loads(line).items() if key not in ('seconds', 'verdict')} for line in open(f'{out}/log.jsonl')]


def test_two_ranks_with_the_model_whole_or_sharded_log_train_and_merge_as_one_process_does(run, arguments, model_dir, tmp_path):
    start = peft_adapter(tmp_path / 'start', model_dir, ATTENTION)
    arguments = [*arguments, f'--init_from={start}', '--lora_dropout=0', '--batch_size=5', '--micro_batch_tokens=40',
                 '--lora_scale=absolute', '--learning_rate=0.01']  # dropout is each rank's own
    ends = {name: forked(2, *arguments, f'--output_dir={tmp_path / name}', f'--fsdp={name == "sharded"}', f'--gradient_checkpointing={name == "sharded"}')
            for name in ('whole', 'sharded')}
    assert run('cb_train.py', *arguments)[0] == 0
    want, merged = records_of(tmp_path / 'out'), tensors_of(tmp_path / 'out')
    for name, children in ends.items():
        out = tmp_path / name
        assert ended(children) == [0, 0], open(f'{out}.stderr').read()[-2000:]
        found = records_of(out)
        assert len(found) == len(want) == 4 and all(a == pytest.approx(b, rel=1e-4) for a, b in zip(found, want))
        ours, theirs = (load_file(f'{folder}/adapter/adapter_model.safetensors') for folder in (out, tmp_path / 'out'))
        assert ours.keys() == theirs.keys() and all(torch.allclose(ours[key], theirs[key], rtol=0, atol=1e-5) for key in theirs)
        assert all(torch.allclose(tensor, merged[key], rtol=0, atol=1e-5) for key, tensor in tensors_of(out).items())
        assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / 'out')) and not os.path.exists(f'{out}.partial')
        assert len(said(out, 'stdout')) == 4 and not said(out)  # rank 0 speaks for all


def test_ranks_that_are_not_in_one_run_say_so_once_before_anything_is_written(arguments, tmp_path):
    (tmp_path / 'c.py').write_text('import os\nseed = int(os.environ["RANK"])')
    out = tmp_path / 'two'
    assert torchrun(2, str(tmp_path / 'c.py'), *arguments, f'--output_dir={out}').wait(120) == 1  # its own; that of each rank is 2
    assert said(out) == ['error: the ranks have other options, rows or checkpoints; the same files for each rank wanted']
    assert 'exitcode  : 2' in open(f'{out}.stderr').read() and not out.exists() and not os.path.exists(f'{out}.partial')


def rank_of(process):
    """The process ids of torchrun's ranks: {rank: id}."""
    children = open(f'/proc/{process.pid}/task/{process.pid}/children').read().split()
    found = {child: dict(entry.partition('=')[::2] for entry in open(f'/proc/{child}/environ').read().split('\0')) for child in children}
    return {int(names['RANK']): int(child) for child, names in found.items() if 'RANK' in names}


def wait_for_steps(is_running, out, more):
    """Waits until a run has logged so many more steps than it had."""
    log = f'{out}.partial/log.jsonl'
    steps = lambda: open(log).read().count('\n') if os.path.exists(log) else 0
    before = steps()
    while steps() < before + more:
        assert is_running(), open(f'{out}.stderr').read()[-2000:]
        time.sleep(0.01)


def test_two_ranks_move_the_adversary_as_one_process_does(run, arguments, tmp_path):
    arguments = [*arguments, '--lora_dropout=0', '--batch_size=4', '--soft_contexts=0.5', '--broken=0.5', '--loss_on=harmful_response', '--lora_start=0.04']
    both = forked(2, *arguments, f'--output_dir={tmp_path / "both"}')
    assert run('cb_train.py', *arguments)[0] == 0
    assert ended(both) == [0, 0], open(tmp_path / 'both.stderr').read()[-2000:]
    for a, b in zip(records_of(tmp_path / 'both'), records_of(tmp_path / 'out'), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.skipif(not os.path.isdir('/proc'), reason='finds the ranks in /proc')
def test_a_run_whose_rank_is_killed_and_that_is_stopped_by_a_signal_ends_at_once_and_resumes_to_the_same_bytes(arguments, tmp_path):
    arguments = [*arguments, '--max_steps=40', '--save_interval=5', '--eval_interval=30', '--fsdp=True']
    out, whole = tmp_path / 'out', forked(2, *arguments, f'--output_dir={tmp_path / "whole"}')
    process = torchrun(2, *arguments)
    wait_for_steps(lambda: process.poll() is None, out, 8)
    os.kill(rank_of(process)[1], signal.SIGKILL)
    assert process.wait(20) == 1 and len(said(out)) == 1 and said(out)[0].startswith('fault: rank 0: lost another rank'), open(f'{out}.stderr').read()
    saved = cb_train.read_checkpoint(str(out) + '.partial/' + cb_train.CHECKPOINT)
    assert saved['state']['step'] >= 5

    ranks, killed = forked(2, *arguments, '--resume=True'), len(said(out))
    wait_for_steps(lambda: os.waitpid(ranks[0], os.WNOHANG) == (0, 0), out, 3)
    os.kill(ranks[1], signal.SIGTERM)  # one of them: all stop after the same step
    assert ended(ranks) == [143, 143]
    line, = said(out)[killed:]
    assert line.startswith('SIGTERM: step ') and '--resume=True' in line

    assert ended(forked(2, *arguments, '--resume=True')) == ended(whole) == [0, 0]
    assert records_of(out) == records_of(tmp_path / 'whole') and len(records_of(out)) == 40
    ours, theirs = ((folder / 'adapter' / 'adapter_model.safetensors').read_bytes() for folder in (out, tmp_path / 'whole'))
    assert ours == theirs


def test_a_resume_with_another_number_of_ranks_and_shards_without_ranks_are_refused(run, interrupted, monkeypatch):
    status, _, err = run('cb_train.py', *interrupted, '--resume=True', '--fsdp=True')
    assert status == 2 and err.count('\n') == 1 and 'torchrun' in err
    monkeypatch.setenv('WORLD_SIZE', '2')
    status, _, err = run('cb_train.py', *interrupted, '--resume=True')
    assert status == 2 and err.count('\n') == 1 and 'ranks=2 (was 1)' in err
    status, _, err = run('cb_train.py', *interrupted, '--batch_size=1')
    assert status == 2 and err == 'error: 2 ranks and 1 rows of each set a step found, a row for each rank wanted\n'


@pytest.mark.parametrize('world', [2, 3, 4, 9, 11])
def test_ranks_share_the_rows_evenly_in_the_same_number_of_passes(ragged, world):
    _, _, rows = ragged
    shares = [cb_train.my_batches(rows, options(batch_size=3, micro_batch_tokens=18, rank=rank, world=world)) for rank in range(world)]
    tokens = [sum(len(row.ids) for batch in share for row in batch if row is not cb_train.PHANTOM) for share in shares]
    found = [row for share in shares for batch in share for row in batch if row is not cb_train.PHANTOM]
    assert sorted(map(str, found)) == sorted(map(str, rows)) and len({len(share) for share in shares}) == 1
    assert max(tokens) - min(tokens) <= 9 and cb_train.count([cb_train.PHANTOM]) == 0
    for batch in (batch for share in shares for batch in share):
        assert len(batch) <= 3 and (len(batch) == 1 or len(batch) * len(batch[0].ids) <= 18)


@pytest.fixture
def group():
    """group(backend, world): makes this process rank 0 of a process group for the length of a test."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    yield lambda backend, world: dist.init_process_group(backend, store=FakeStore() if backend == 'fake' else dist.HashStore(), rank=0, world_size=world)
    dist.destroy_process_group()


@pytest.mark.parametrize('checkpointing', [False, True])
def test_sharded_blocks_have_the_same_losses_bit_for_bit_and_the_same_gradients_within_rounding(adapted, group, checkpointing):
    model, loras, rows = adapted
    if checkpointing:
        cb_train.checkpoint_blocks(model)
    want = losses_and_gradients(model, loras, rows)
    group('gloo', 1)
    cb_train.shard(model, 'cpu')
    found = losses_and_gradients(model, loras, rows)
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])
    assert all(close(a, b, 2e-6) for a, b in zip(found[2], want[2]))  # the states' gradients are added in another order


@pytest.mark.parametrize('checkpointing', [False, True])
def test_sharded_blocks_gather_their_weights_once_a_pass_forward_and_once_backward_and_one_more(adapted, group, monkeypatch, checkpointing):
    import torch.distributed as dist
    model, loras, rows = adapted
    if checkpointing:
        cb_train.checkpoint_blocks(model)
    group('fake', 2)  # sends nothing
    cb_train.shard(model, 'cpu')
    assert model.layers[0].mlp.up_proj.weight.to_local().shape == (24, 32)
    assert loras['layers.0.self_attn.q_proj'].lora_A.shape == (4, 32)
    gathers, real = [], dist.all_gather_single
    monkeypatch.setattr(dist, 'all_gather_single', lambda *more, **named: gathers.append(1) or real(*more, **named))
    ids, mask = cb_train.pad(counted(rows), 'cpu')
    h, h_lora = cb_train.reference_and_adapted(model, loras, ids)
    assert len(gathers) == 2 * 3  # a reference pass and an adapted one, three blocks each
    cb_train.retain_loss(h, h_lora, mask, [1, 2, 3]).backward()
    assert len(gathers) == 3 * 3 + 1  # and the reference pass's last block, ahead: FSDP thinks that it comes next
