import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from conftest import ROOT, SHAPE, make_model_dir
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import cb_train

ATTENTION = ['q_proj', 'k_proj', 'v_proj', 'o_proj']
TINY = ['--target_layers=2', '--num_hidden_layers=3', '--layers_to_transform=0,1,2', '--lora_r=4', '--lora_alpha=8', '--max_steps=4',
        '--batch_size=3', '--learning_rate=0.01', '--log_interval=1', '--eval_interval=2', '--device=cpu', '--dtype=auto']


@pytest.fixture
def arguments(model_dir, rows, tmp_path):
    return [f'--model_name={model_dir}', f'--cb_data_path={rows["cb"]}', f'--retain_data_path={rows["retain"]}',
            f'--val_data_path={rows["val"]}', f'--output_dir={tmp_path / "out"}', *TINY]


@pytest.fixture
def adapted(model_dir):
    """Three blocks of the tiny model with a LoRA whose B is not zero, and a ragged batch: model, {name: LoRA}, three rows of token ids."""
    model = cb_train.load_decoder(model_dir, 3, 'float32', 'cpu')
    assert cb_train.can_pack(model, torch.randint(20, (2, 32)))
    loras = cb_train.add_lora(model, ATTENTION, [0, 1, 2], 4, 8, 0.0)
    torch.manual_seed(1)
    for lora in loras.values():
        torch.nn.init.normal_(lora.lora_B, std=0.2)
    return model, loras, [[2, 4, 7, 8, 9, 3], [2, 4, 11, 3], [2, 12]]


def packed(model, rows, **more):
    """Rows of token ids as one pass: (inputs, mask)."""
    ids, mask, lengths = cb_train.pack([cb_train.Row(row, 0) for row in rows], 'cpu')
    return cb_train.block_inputs(model, ids, lengths, **more), mask


def losses_and_gradients(model, loras, rows, **more):
    inputs, mask = packed(model, rows)
    retain, _ = cb_train.retain_pass(model, inputs, mask, [2], **more)
    cb, _ = cb_train.cb_pass(model, inputs, mask, [2], **more)
    parameters = [p for lora in loras.values() for p in (lora.lora_A, lora.lora_B)]
    return retain, cb, torch.autograd.grad(3 * retain / mask.sum() + 7 * cb / mask.sum(), parameters)


def close(a, b, relative):
    return (a - b).norm() <= relative * b.norm()


def test_one_steps_losses_and_gradients_equal_those_of_peft(adapted, model_dir):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel
    model, loras, rows = adapted
    retain, cb, gradients = losses_and_gradients(model, loras, rows)
    config, _ = cb_train.truncated_config(model_dir, 3)
    twin = get_peft_model(AutoModel.from_pretrained(model_dir, config=config), LoraConfig(
        r=4, lora_alpha=8, target_modules=ATTENTION, lora_dropout=0.0))
    named = dict(twin.named_parameters())
    theirs = [named[f'base_model.model.{name}.{part}.default.weight'] for name in loras for part in ('lora_A', 'lora_B')]
    for p, lora_p in zip(theirs, [p for lora in loras.values() for p in (lora.lora_A, lora.lora_B)]):
        p.data.copy_(lora_p.data)
    real = torch.tensor([[1] * len(row) + [0] * (6 - len(row)) for row in rows])  # (B, T)
    inputs = dict(input_ids=torch.tensor([row + [0] * (6 - len(row)) for row in rows]), attention_mask=real, output_hidden_states=True, use_cache=False)
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
    plain, saved = (losses_and_gradients(model, loras, rows, checkpointing=c)[2] for c in (False, True))
    assert all(close(a, b, 1e-6) for a, b in zip(saved, plain))


@pytest.fixture
def ragged(adapted):
    """The model and LoRA of adapted, and nine rows of lengths 1..9 in mixed order, some of which count from their third token on."""
    model, loras, _ = adapted
    draw = torch.Generator().manual_seed(3)
    return model, loras, [cb_train.Row(torch.randint(2, 20, (n,), generator=draw).tolist(), 2 * (n > 6)) for n in (4, 9, 1, 6, 2, 8, 7, 3, 5)]


def plain_sums(model, loras, rows, target_layers):
    """Both losses' sums over rows taken one at a time, by transformers' hidden states and torch's own functions alone."""
    retain, cb = 0, 0
    for row in rows:
        run = lambda: model(torch.tensor([row.ids]), output_hidden_states=True, use_cache=False).hidden_states
        with torch.no_grad(), cb_train.adapter_off(model):
            h = run()
        h_lora = run()
        retain = retain + sum((b - a).norm(dim=-1)[0, row.start:].sum() for a, b in zip(h[1:], h_lora[1:])) / (len(h) - 1)
        cb = cb + sum(torch.cosine_similarity(h[l], h_lora[l], dim=-1)[0, row.start:].relu().sum() for l in target_layers) / len(target_layers)
    return retain, cb


@pytest.mark.parametrize('batch_size, tokens, checkpointing', [(9, 10 ** 6, False), (1, 1, False), (2, 10 ** 6, False), (9, 16, False), (3, 12, True)])
def test_any_split_of_a_step_gives_the_losses_and_gradients_of_a_plain_loop_over_its_rows(ragged, batch_size, tokens, checkpointing):
    model, loras, rows = ragged
    parameters = [p for lora in loras.values() for p in (lora.lora_A, lora.lora_B)]
    want = plain_sums(model, loras, rows, [1, 2])
    for run, loss in zip((cb_train.retain_pass, cb_train.cb_pass), want):
        batches = cb_train.passes(model, rows, batch_size, tokens, 'cpu')
        found, _ = cb_train.add_gradient(run, model, batches, [1, 2], 0.3, checkpointing)
        assert close(found, loss, 1e-5)
        for parameter, gradient in zip(parameters, torch.autograd.grad(0.3 * loss, parameters, retain_graph=True, materialize_grads=True)):
            assert close(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, gradient, 1e-5)
            parameter.grad = None


def test_passes_take_each_row_once_by_length_and_keep_to_both_limits(ragged):
    model, _, rows = ragged
    lengths = lambda *limits: [inputs[1][0]['lengths'] for inputs, _ in cb_train.passes(model, rows, *limits, 'cpu')]
    assert lengths(9, 18) == [[9, 8], [7, 6, 5], [4, 3, 2, 1]] and lengths(2, 18) == [[9, 8], [7, 6], [5, 4], [3, 2], [1]]
    assert lengths(9, 1) == [[n] for n in range(9, 0, -1)]


def test_the_other_cb_losses_are_what_a_hand_computes():
    u = torch.tensor([0.6, 0.8])
    assert cb_train.towards('random', u)(torch.tensor([[[6.0, 8.0], [-3.0, -4.0]]])).tolist() == [[pytest.approx(0, abs=1e-6), 2.0]]
    assert cb_train.towards('rmu', u, 10.0)(torch.tensor([[[6.0, 9.0]]])).tolist() == [[0.5]]  # (0^2 + 1^2) / 2


def test_a_soft_prompt_stands_anywhere_in_the_request_and_the_states_are_transformers_own(adapted):
    model, loras, _ = adapted
    rows, soft = [cb_train.Row([2, 4, 7, 8], 2), cb_train.Row([2, 9], 0)], torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    lot = random.Random(0)
    ids, mask, lengths = cb_train.pack(found := [cb_train.opened(row, 3, lot) for row in rows], 'cpu')
    assert mask.tolist() == [[0] * 5 + [1] * 2 + [1] * 5] and lengths == [7, 5]
    places = [row.ids.index(-1) for row in found]
    assert all(found[i].ids == rows[i].ids[:at] + [-1] * 3 + rows[i].ids[at:] and 1 <= at <= 2 for i, at in enumerate(places))
    assert {cb_train.opened(rows[0], 1, lot).ids.index(-1) for _ in range(20)} == {1, 2}
    ours = [h.split(lengths, 1) for _, h, _ in cb_train.streams(model, cb_train.block_inputs(model, ids, lengths, soft), 3)]
    for i, row in enumerate(rows):
        embedded = model.embed_tokens(torch.tensor(row.ids))
        x = torch.cat([embedded[:places[i]], soft, embedded[places[i]:]])[None]
        with torch.no_grad(), cb_train.adapter_off(model):
            want = model(inputs_embeds=x, output_hidden_states=True, use_cache=False).hidden_states[1:]
        assert all(torch.allclose(a[i], b, atol=1e-5) for a, b in zip(ours, want))


def test_a_run_with_soft_prompts_is_another_run_gives_the_same_bytes_again_and_refuses_a_bad_file(run, arguments, tmp_path):
    from safetensors.torch import save_file
    path = tmp_path / 'soft.safetensors'
    save_file({'soft_prompts': torch.randn(2, 3, 32)}, path)
    more = [f'--soft_prompts_path={path}', '--loss_on=harmful_response', '--lora_b_std=0.1', '--cb_loss=random']
    assert run('cb_train.py', *arguments, *more)[0] == 0
    want = (tmp_path / 'out' / 'adapter' / 'adapter_model.safetensors').read_bytes()
    log = [json.loads(line) for line in open(tmp_path / 'out' / 'log.jsonl')]
    assert log[0]['retain_loss'] > 0.01 and log[-1]['cb_loss'] < log[0]['cb_loss']  # B is not zero: it moves at once
    shutil.rmtree(tmp_path / 'out')
    assert run('cb_train.py', *arguments, *more, '--save_interval=2')[0] == 0
    assert (tmp_path / 'out' / 'adapter' / 'adapter_model.safetensors').read_bytes() == want
    without = run('cb_train.py', *arguments, *more[1:], f'--output_dir={tmp_path / "other"}')
    assert without[0] == 0 and (tmp_path / 'other' / 'adapter' / 'adapter_model.safetensors').read_bytes() != want
    for tensors, words in (({'soft_prompts': torch.zeros(2, 3, 8)}, '[2, 3, 8]'), ({'other': torch.zeros(1)}, 'KeyError')):
        save_file(tensors, path)
        status, _, err = run('cb_train.py', *arguments, *more, f'--output_dir={tmp_path / "third"}')
        assert status == 2 and words in err and err.count('\n') == 1 and not (tmp_path / 'third').exists(), err


def test_the_answer_alone_of_harmful_rows_and_all_of_benign_rows_can_count(run, arguments, tmp_path):
    status, out, err = run('cb_train.py', *arguments, '--loss_on=harmful_response')
    assert status == 0, err
    told = {name: int(line.split(' rows, ')[1].split()[0]) for line in out.splitlines() for name in ('retain', 'harmful') if line.startswith(f'{name}: ')}
    _, everything, _ = run('cb_train.py', *arguments, f'--output_dir={tmp_path / "all"}')
    whole = {name: int(line.split(' rows, ')[1].split()[0]) for line in everything.splitlines() for name in ('retain', 'harmful') if line.startswith(f'{name}: ')}
    assert told['retain'] == whole['retain'] and told['harmful'] < whole['harmful']


def test_the_step_reads_nothing_back_from_the_device(ragged):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        names = []

        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            self.names.append(function.name())
            return function(*arguments, **named or {})
    model, loras, rows = ragged
    batches = list(cb_train.passes(model, rows, 2, 64, 'cpu'))
    with Calls() as calls:
        for run in (cb_train.retain_pass, cb_train.cb_pass):
            cb_train.add_gradient(run, model, batches, [1, 2], 0.3)
    assert 'aten::mm' in calls.names and not {'aten::_local_scalar_dense', 'aten::is_nonzero', 'aten::nonzero', 'aten::equal'} & set(calls.names)


def test_the_lora_product_has_autograds_gradients_and_keeps_no_copy_of_its_input():
    torch.manual_seed(0)
    y, x, a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (5, 4), (2, 4), (3, 2)))
    for kept in (None, cb_train.dropout_mask(x, 0.5)):
        assert torch.autograd.gradcheck(lambda *tensors: cb_train.AddLoRA.apply(tensors[0], tensors[1], kept, *tensors[2:], 0.7), (y, x, a, b))
        want = y + (x if kept is None else x * kept) @ a.T @ b.T * 0.7
        out = cb_train.AddLoRA.apply(y, x, kept, a, b, 0.7)
        assert torch.allclose(out, want) and out.grad_fn.saved_tensors[0].data_ptr() == x.data_ptr()
    assert cb_train.dropout_mask(torch.empty(1000, 333), 0.05).float().mean().item() == pytest.approx(0.95, abs=2e-3)
    lora = cb_train.LoRALinear(torch.nn.Linear(1000, 8), 8, 16, 0.25)
    lora.lora_A.data, lora.lora_B.data = torch.ones(8, 1000), torch.eye(8)
    out = lora(torch.ones(4, 50, 1000)) - lora.base(torch.ones(4, 50, 1000))  # every product is 2 / 0.75 times the elements that are left
    assert out.mean().item() == pytest.approx(2000, rel=5e-3) and len(set(out[:, :, 0].flatten().round().tolist())) > 20
    assert torch.allclose(lora.eval()(torch.ones(1, 1000)), lora.base(torch.ones(1, 1000)) + 2000)


def test_flash_attention_is_asked_for_on_a_gpu_in_half_precision_where_it_is_installed(monkeypatch):
    asked = [('bfloat16', 'cuda'), ('float16', 'cuda:1'), ('float32', 'cuda'), ('bfloat16', 'cpu')]
    for there, want in ((None, [None] * 4), ('there', ['flash_attention_2'] * 2 + [None] * 2)):
        monkeypatch.setattr('importlib.util.find_spec', lambda name: there)
        assert [cb_train.attention(*each) for each in asked] == want


def test_flash_attention_is_told_where_the_packed_rows_end(adapted, monkeypatch):
    from transformers import modeling_flash_attention_utils as flash
    model, _, rows = adapted
    want = [h for _, h, _ in cb_train.streams(model, packed(model, rows)[0], 3)]

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, **_):  # (T, heads, d), the kernel's own arguments
        assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist() == [0, 6, 10, 12] and max_seqlen_q == max_seqlen_k == 6 and cu_seqlens_q.dtype == torch.int32
        q, k, v = (x.transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], 0).split([6, 4, 2], 1) for x in (q, k, v))
        heads = [((a @ b.mT * softmax_scale).masked_fill(torch.ones(a.shape[1], a.shape[1]).triu(1) > 0, -torch.inf).softmax(-1) @ c) for a, b, c in zip(q, k, v)]
        return torch.cat(heads, 1).transpose(0, 1)
    monkeypatch.setattr(flash, 'lazy_import_flash_attention', lambda *_, **__: ((None, varlen, None, None, None), (
        lambda **given: {'softmax_scale': given['softmax_scale'], **{name: given[name] for name in ('max_seqlen_q', 'max_seqlen_k') if name in given}}, None)))
    monkeypatch.setattr(model.config, '_attn_implementation_internal', 'flash_attention_2')
    assert all(close(h, other, 1e-5) for (_, h, _), other in zip(cb_train.streams(model, packed(model, rows)[0], 3), want))


ONE_BY_ONE = {  # families that keep no packed rows apart: by a mask that no argument tells of, by arguments that do not arrive
    'qwen2 moe': lambda: transformers.Qwen2MoeConfig(**SHAPE, num_experts=4, use_sliding_window=True, sliding_window=4, max_window_layers=4,
                                                     shared_expert_intermediate_size=24, **MOE),
    'stablelm': lambda: transformers.StableLmConfig(**SHAPE)}


@pytest.mark.parametrize('family', ONE_BY_ONE)
def test_a_family_that_cannot_keep_packed_rows_apart_gets_one_row_a_pass(run, arguments, tmp_path, family):
    base = make_model_dir(tmp_path / 'base', config=ONE_BY_ONE[family]())
    model = cb_train.load_decoder(base, 3, 'auto', 'cpu')
    assert not cb_train.can_pack(model, torch.randint(20, (2, 9))) and model.config._attn_implementation == 'sdpa'
    status, out, err = run('cb_train.py', *arguments, f'--model_name={base}', '--max_steps=2', '--batch_size=4')
    assert status == 0 and 'passes of at most 1 row and' in out, err


def test_a_family_that_computes_its_blocks_in_another_way_is_refused_in_one_line(adapted, monkeypatch, capsys):
    model, _, _ = adapted
    for wrong in (lambda *more, **named: (_ for _ in ()).throw(KeyError('x')), lambda *more, **named: torch.zeros(1)):
        monkeypatch.setattr(model.layers[1], 'forward', wrong)
        monkeypatch.setattr(cb_train, 'states', lambda model, rows: [torch.ones(*rows.shape, 32)] * 3)
        with pytest.raises(SystemExit) as stop:
            cb_train.can_pack(model, torch.randint(20, (2, 9)))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count('\n') == 1 and 'in another way' in err


def test_what_the_backward_pass_keeps_is_counted_without_touching_the_random_numbers(ragged):
    model, loras, _ = ragged
    for lora in loras.values():
        lora.dropout = 0.5
    before = torch.get_rng_state()
    found = cb_train.bytes_kept(model, torch.arange(64).view(2, 32) % 20)
    assert torch.equal(before, torch.get_rng_state())
    floats = 2 * 32 + 3 * 48 + 32 + 64 + 3 * 32 + 4 * 4  # two norms' inputs; gate, up, silu; q k v's input; q k v; attention, o's input, distance; A x
    assert 3 * 4 * floats <= found <= 1.5 * 3 * 4 * floats


@pytest.mark.parametrize('free, choice, want', [(10 ** 9, 'auto', False), (10 ** 5, 'auto', True), (10 ** 5, 'False', False), (10 ** 9, 'True', True)])
def test_auto_computes_blocks_again_where_the_largest_pass_would_take_more_than_half_of_the_memory(ragged, monkeypatch, free, choice, want):
    model, loras, _ = ragged
    monkeypatch.setattr(cb_train, 'memory_at_hand', lambda device: free)
    probe = torch.arange(64).view(2, 32) % 20
    tokens, checkpointing, _ = cb_train.plan(model, probe, 9, 4, 20, choice)
    assert (tokens, checkpointing) == (20, want)
    most = 2 * 20 * cb_train.bytes_kept(model, probe)  # of which 20 tokens are just half
    monkeypatch.setattr(cb_train, 'memory_at_hand', lambda device: most + 1)
    assert not cb_train.plan(model, probe, 9, 4, 20, 'auto')[1]
    assert cb_train.plan(model, probe, 21, 4, 20, 'auto')[1]


def test_checkpointing_by_choice_or_by_memory_and_the_seed_give_the_same_bytes(run, arguments, tmp_path):
    for name in ('auto', 'True', 'False'):
        status, out, err = run('cb_train.py', *arguments, f'--output_dir={tmp_path / name}', f'--gradient_checkpointing={name}')
        assert status == 0 and ('the graph of the largest pass takes' in out) == (name == 'auto'), err
    adapters = {(tmp_path / name / 'adapter' / 'adapter_model.safetensors').read_bytes() for name in ('auto', 'True', 'False')}
    assert len(adapters) == 1


def test_with_the_adapter_off_the_streams_are_the_librarys_hidden_states_bit_for_bit(adapted, model_dir):
    from transformers import AutoModelForCausalLM
    model, loras, rows = adapted
    whole = AutoModelForCausalLM.from_pretrained(model_dir)
    want = whole(torch.tensor(rows[:1]), output_hidden_states=True).hidden_states
    for l, h, h_lora in cb_train.streams(model, packed(model, rows[:1])[0], 3):
        assert not torch.equal(h, h_lora)
        assert torch.equal(h, want[l]) if l < 3 else torch.equal(h, whole.model.norm(want[3]))
    assert all(lora.enabled for lora in loras.values())


def test_the_losses_are_what_a_hand_computes():
    h, h_lora = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [5.0, 5.0]]]), torch.tensor([[[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]]])
    assert cb_train.Distance.apply(h, h_lora, torch.tensor([[1.0, 1.0, 0.0]])).item() == pytest.approx(6.0)
    found = cb_train.cosine(h, torch.tensor([[[4.0, 3.0], [-2.0, 0.0], [1.0, 1.0]]]), torch.tensor([[1.0, 1.0, 0.0]]))
    assert found[0].tolist() == pytest.approx([24 / 25, -1.0, 0.0])
    same = torch.ones(1, 1, 2, requires_grad=True)
    assert torch.autograd.grad(cb_train.Distance.apply(torch.ones(1, 1, 2), same, torch.ones(1, 1)), same)[0].tolist() == [[[0.0, 0.0]]]


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


def peft_adapter(path, model_dir, modules, dropout=0.0, layers=(0, 1, 2)):
    """An adapter with a B that is not zero, written by peft itself. Returns its folder."""
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), LoraConfig(
        r=4, lora_alpha=8, target_modules=modules, lora_dropout=dropout, layers_to_transform=list(layers), layers_pattern='layers', task_type='CAUSAL_LM'))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    return str(path)


def tensors_of(folder):
    return {k: v for name in cb_train.shards(str(folder)) for k, v in load_file(f'{folder}/{name}').items()}


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
    'llama seven modules': (lambda: LlamaConfig(**SHAPE), torch.float32, ATTENTION + ['gate_proj', 'up_proj', 'down_proj'])}


@pytest.mark.parametrize('family', FAMILIES)
def test_a_family_walks_as_transformers_does_learns_and_merges_as_peft_does(run, arguments, tmp_path, family):
    from peft import PeftModel
    make, dtype, modules = FAMILIES[family]
    base = make_model_dir(tmp_path / 'base', dtype, '20KB', make())
    assert len(cb_train.shards(base)) >= 2
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    model = cb_train.load_decoder(base, 3, 'auto', 'cpu')
    loras = cb_train.add_lora(model, modules, [0, 1, 2], 4, 8, 0.0)
    rows = [[2, 4, 7, 8, 9, 3, 5, 10, 11, 12, 13, 3], [2, 12, 4, 4, 9, 8, 7], [2, 6], [2]]  # the first two longer than a sliding window
    ids = torch.tensor(rows[:1])
    assert cb_train.can_pack(model, torch.randint(20, (2, 9))) == (family != 'gemma2 tied')  # whose attention is eager: one row a pass
    with torch.no_grad(), cb_train.adapter_off(model):
        want = [whole(torch.tensor([row]), output_hidden_states=True, use_cache=False).hidden_states for row in rows]
        for (l, h, _), other in zip(cb_train.streams(model, packed(model, rows[:1])[0], 2), want[0][1:]):
            assert torch.equal(h, other)
        for l, h, _ in cb_train.streams(model, packed(model, rows)[0], 2):
            assert all(close(mine, theirs[l], 1e-6 if dtype == torch.float32 else 1e-2) for mine, theirs in zip(h.split([12, 7, 2, 1], 1), want))

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


def published_losses(model_dir, adapter, retain, harmful, divisor, blocks=3, target=2, positions=512):
    """The equations of the paper by peft and transformers alone, on lists of id lists: (retain_loss, cb_loss)."""
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
                sums[0] += sum((b - a).norm(dim=-1).sum() for a, b in zip(h, h_lora))  # the embedding's distance is zero
            else:
                sums[1] += torch.cosine_similarity(h_lora[target], h[target], dim=-1).relu().sum()
                sums[2] += len(row)
    real = sum(map(len, retain))
    return (sums[0] / (blocks * real if divisor == 'real' else (blocks + 1) * len(retain) * positions)).item(), (sums[1] / sums[2]).item()


@pytest.mark.parametrize('divisor', ['real', 'published'])
@pytest.mark.parametrize('accumulation', [1, 4])
def test_the_first_steps_losses_are_those_of_peft_and_transformers(run, arguments, model_dir, rows, tmp_path, divisor, accumulation):
    start = peft_adapter(tmp_path / 'start', model_dir, ATTENTION)
    few = {kind: [json.loads(line) for line in open(rows[kind])] if kind == 'retain' else json.load(open(rows[kind])) for kind in ('retain', 'cb')}
    (tmp_path / 'retain8.jsonl').write_text('\n'.join(map(json.dumps, few['retain'][:8])))
    (tmp_path / 'cb8.json').write_text(json.dumps(few['cb'][:8]))
    status, _, err = run('cb_train.py', *arguments, f'--init_from={start}', f'--retain_data_path={tmp_path / "retain8.jsonl"}',
                         f'--cb_data_path={tmp_path / "cb8.json"}', f'--batch_size={8 // accumulation}', f'--retain_divisor={divisor}',
                         f'--gradient_accumulation_steps={accumulation}', '--lora_dropout=0', '--max_steps=1')
    assert status == 0, err
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    sets = [[tokenizer.apply_chat_template(r.get('messages') or [{'role': 'user', 'content': r['prompt']}, {'role': 'assistant', 'content': r['response']}],
                                           return_dict=False) for r in few[kind][:8]] for kind in ('retain', 'cb')]
    assert len(set(map(len, sets[0]))) > 1
    record = json.loads(open(tmp_path / 'out' / 'log.jsonl').readline())
    assert (record['retain_loss'], record['cb_loss']) == pytest.approx(published_losses(model_dir, start, *sets, divisor), rel=1e-5)
    assert record['retain_loss'] > 0 and record['cb_loss'] < 0.999


def test_an_adapter_of_ours_or_pefts_is_merged_alone_and_one_that_does_not_fit_is_refused(run, arguments, model_dir, tmp_path):
    from peft import PeftModel
    start = peft_adapter(tmp_path / 'start', model_dir, ATTENTION)
    assert run('cb_train.py', *arguments, f'--init_from={start}', '--merge_only=True', '--cb_data_path=none')[0] == 0
    twin = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), start).merge_and_unload().state_dict()
    assert all(torch.allclose(tensor, twin[name], atol=1e-6) for name, tensor in tensors_of(tmp_path / 'out').items())
    assert 'merged the adapter' in (tmp_path / 'out' / 'README.md').read_text()
    assert run('cb_train.py', *arguments, f'--init_from={tmp_path / "out" / "adapter"}', f'--output_dir={tmp_path / "again"}', '--merge_only=True')[0] == 0
    assert all(torch.equal(tensor, tensors_of(tmp_path / 'again')[name]) for name, tensor in tensors_of(tmp_path / 'out').items())
    for more, word in ((['--lora_r=8'], 'r=4'), (['--lora_alpha=4'], 'lora_alpha=8'), (['--target_modules=q_proj'], 'target_modules'),
                       (['--layers_to_transform=0,1'], 'layers_to_transform'), ([f'--init_from={tmp_path}'], 'adapter_config.json'),
                       (['--merge_adapter=False', '--merge_only=True'], 'merge_only')):
        status, _, err = run('cb_train.py', *arguments, f'--init_from={start}', f'--output_dir={tmp_path / "no"}', *more)
        assert status == 2 and err.count('\n') == 1 and word in err and not (tmp_path / 'no').exists(), err


def test_the_adapter_can_be_saved_alone_and_the_card_names_recipe_and_counts(run, arguments, tmp_path):
    assert run('cb_train.py', *arguments, '--merge_adapter=False')[0] == 0
    assert sorted(os.listdir(tmp_path / 'out')) == ['README.md', 'adapter', 'cb_config.json', 'log.jsonl']
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert card.startswith('---\n') and '10 retain rows, 12 harmful rows' in card and '| target_layers | [2] |' in card and '## Evaluation' in card


def test_response_masks_and_lengths_count_the_last_answers_tokens(model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    words = lambda row, start=0: tokenizer.convert_ids_to_tokens(row.ids[start:])
    talk = [{'role': r, 'content': c} for r, c in (('user', 'red'), ('assistant', 'blue'), ('user', 'one two'), ('assistant', 'yes no'))]
    row = cb_train.encode(tokenizer, talk, '', 512, 'response')
    assert words(row, row.start) == ['yes', 'no', '<end>'] and words(row)[:3] == ['<bos>', '<user>', 'red'] and cb_train.count([row]) == 3
    ids, mask, lengths = cb_train.pack([row, cb_train.Row([2, 4, 3], 0)], 'cpu')
    assert ids.tolist() == [row.ids + [2, 4, 3]] and mask.tolist() == [[0] * row.start + [1] * 6] and lengths == [len(row.ids), 3]
    cut = cb_train.encode(tokenizer, talk, '', 512, 'all', (4, 2))
    assert words(cut) == ['<bos>', '<user>', 'red', '<end>', 'yes', 'no'] and cut.start == 0
    assert cb_train.encode(tokenizer, talk, '', 8, 'response') is None and len(cb_train.encode(tokenizer, talk, '', 8).ids) == 8


def test_token_ids_are_kept_and_read_back_and_a_broken_or_refused_cache_is_written_anew(model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    tokenizer, calls, real = AutoTokenizer.from_pretrained(model_dir), [], cb_train.encode
    monkeypatch.setattr(cb_train, 'encode', lambda *all: calls.append(all) or real(*all))
    talk = lambda *words: [{'role': 'user', 'content': words[0]}, {'role': 'assistant', 'content': words[1]}]
    some = [('a: row 1', talk('red', 'blue')), ('a: row 2', talk('one two three one two three', 'no')), ('a: row 3', talk('two', 'yes'))]
    run = lambda some=some, *more: cb_train.encode_all(tokenizer, some, 'option', *(more or (8, 'response')))
    first = run()
    assert [row.where for row in first] == ['a: row 1', 'a: row 3'] and len(calls) == 3  # the second is dropped: no answer among its first 8 tokens
    assert run([('b' + where[1:], messages) for where, messages in some]) == [row._replace(where='b' + row.where[1:]) for row in first] and len(calls) == 3
    path, = (tmp_path / 'cache' / 'circuit-breakers').iterdir()
    whole = path.read_bytes()
    for damage in (b'', whole[:-4], whole[:40] + b'x' + whole[41:], b'garbage'):
        path.write_bytes(damage)
        assert run() == first and path.read_bytes() == whole
    assert len(calls) == 15
    run(some, 9, 'response')
    run(some[:2] + [('a: row 3', talk('two', 'no'))])
    assert len(calls) == 21 and len(list(path.parent.iterdir())) == 3
    tokenizer.chat_template += ' '
    run()
    assert len(calls) == 24
    shutil.rmtree(path.parent)
    path.parent.write_text('a file where the folder should be')
    assert len(run()) == 2 and len(calls) == 27
    path.parent.unlink()
    for i in range(4):
        cb_train.write_rows(str(path.parent / str(i)), first, most=2)
        os.utime(path.parent / str(i), (i, i))
    assert sorted(os.listdir(path.parent)) == ['2', '3']


def test_the_rows_of_a_checkpoint_are_told_apart_by_their_ids_and_by_where_they_count():
    row = cb_train.Row
    digests = [cb_train.rows_digest(sets) for sets in ([[row([1, 2], 0)]], [[row([1, 3], 0)]], [[row([1, 2], 1)]], [[row([1], 0), row([2], 0)]])]
    assert len(set(digests)) == 4 and cb_train.rows_digest([[row([1, 2], 0, 'elsewhere')]]) == digests[0]


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
    status, out, _ = run('cb_train.py', *interrupted, '--resume=True')
    assert status == 0 and 'complete already' in out


def test_killed_signalled_and_out_of_disk_a_run_resumes_to_the_same_bytes():
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'tests', 'stress.py'), '--kills=6', '--disks=6'], capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0 and 'every end identical' in done.stdout and 'every earlier output whole' in done.stdout, done.stderr[-2000:]


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
    assert status == 1 and 'step 1' in err and f'{rows["retain"]}: row ' in err and 'checkpoint of step 0 is kept' in err and 'plums' not in err, err
    _, tensors = cb_train.read_checkpoint(str(tmp_path / 'out.partial' / cb_train.CHECKPOINT), {'options': AnyOptions(), 'rows': Any(), 'base': Any()})
    assert all(tensor.isfinite().all() for tensor in tensors.values())


class Any:
    __eq__, __ne__ = (lambda self, other: True), (lambda self, other: False)


class AnyOptions:
    get = __getitem__ = lambda self, name: Any()


def test_a_second_run_on_the_same_output_is_refused(run, arguments, tmp_path):
    (tmp_path / 'out.partial').mkdir()
    with cb_train.open_log(tmp_path / 'out.partial' / 'log.jsonl'):
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
    (['--target_layers=9'], ['target_layers=[9]', '1..3']), (['--target_layers=0'], ['target_layers']), (['--layers_to_transform=3'], ['0..2']),
    (['--num_hidden_layers=9', '--layers_to_transform=0'], ['num_hidden_layers=9', '4 blocks']), (['--target_modules=qq_proj'], ['qq_proj', 'q_proj']),
    (['--cb_data_path=none.json'], ['none.json', 'no such file']), (['--model_name=none/such/model'], ['none/such/model']),
    (['--lora_dropout=1'], ['lora_dropout']), (['--max_steps=0'], ['max_steps=0']), (['--device=tpu'], ['device=tpu']), (['--device=cuda:x'], ['device=cuda:x']),
    (['--dtype=int8'], ['dtype=int8']), (['--gradient_checkpointing=maybe'], ['auto, True or False']), (['--max_setps=3'], ['did you mean max_steps']), (['--schedule_steps=9', '--use_dynamic_scheduling=0'], ['schedule']),
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


def test_a_complete_run_resumed_with_other_options_is_refused(run, arguments, tmp_path):
    assert run('cb_train.py', *arguments)[0] == 0
    status, _, err = run('cb_train.py', *arguments, '--resume=True', '--max_steps=9')
    assert status == 2 and 'max_steps=9 (was 4)' in err


def test_validation_wants_rows_of_both_labels(run, arguments, tmp_path):
    (tmp_path / 'val.jsonl').write_text('{"label": "benign", "prompt": "red", "response": "yes"}')
    status, _, err = run('cb_train.py', *arguments)
    assert status == 2 and 'val_data_path: harmful: no rows left of 0' in err


def test_a_folder_that_no_run_wrote_is_never_replaced(run, arguments, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'thesis.txt').write_text('mine')
    status, _, err = run('cb_train.py', *arguments, '--overwrite=True')
    assert status == 2 and 'choose another' in err and (tmp_path / 'out' / 'thesis.txt').read_text() == 'mine'


# ---- several ranks ----


def torchrun(ranks, *arguments):
    """Starts cb_train.py on so many gloo processes; what it prints goes to output_dir.stdout and .stderr."""
    out = next(a for a in reversed(arguments) if a.startswith('--output_dir=')).partition('=')[2]
    with open(f'{out}.stdout', 'w') as stdout, open(f'{out}.stderr', 'w') as stderr:
        return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}', 'cb_train.py', *arguments],
                                cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdout=stdout, stderr=stderr)


def said(out, name='stderr'):
    """The lines that the ranks printed, without torchrun's own."""
    return [line for line in open(f'{out}.{name}').read().splitlines() if line.startswith(('error', 'fault', 'SIG', 'step', 'rank'))]


def records_of(out):
    return [{key: value for key, value in json.loads(line).items() if key != 'seconds'} for line in open(f'{out}/log.jsonl')]


def test_two_ranks_with_the_model_whole_or_sharded_log_train_and_merge_as_one_process_does(run, arguments, model_dir, tmp_path):
    start = peft_adapter(tmp_path / 'start', model_dir, ATTENTION)
    arguments = [*arguments, f'--init_from={start}', '--lora_dropout=0', '--batch_size=5', '--micro_batch_tokens=40']  # masks of dropout are each rank's own
    ends = {name: torchrun(2, *arguments, f'--output_dir={tmp_path / name}', f'--fsdp={name == "sharded"}', f'--gradient_checkpointing={name == "sharded"}')
            for name in ('whole', 'sharded')}
    assert run('cb_train.py', *arguments)[0] == 0
    want, merged = records_of(tmp_path / 'out'), tensors_of(tmp_path / 'out')
    for name, process in ends.items():
        out = tmp_path / name
        assert process.wait(120) == 0, open(f'{out}.stderr').read()[-2000:]
        found = records_of(out)
        assert len(found) == len(want) == 4 and all(a == pytest.approx(b, rel=1e-5) for a, b in zip(found, want))
        ours, theirs = (load_file(f'{folder}/adapter/adapter_model.safetensors') for folder in (out, tmp_path / 'out'))
        assert ours.keys() == theirs.keys() and all(torch.allclose(ours[key], theirs[key], rtol=0, atol=1e-5) for key in theirs)
        assert all(torch.allclose(tensor, merged[key], rtol=0, atol=1e-5) for key, tensor in tensors_of(out).items())
        assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / 'out')) and not os.path.exists(f'{out}.partial')
        assert len(said(out, 'stdout')) == 4 and not said(out)  # rank 0 speaks for all


def rank_of(process):
    """The process ids of torchrun's ranks: {rank: id}."""
    children = open(f'/proc/{process.pid}/task/{process.pid}/children').read().split()
    found = {child: dict(entry.partition('=')[::2] for entry in open(f'/proc/{child}/environ').read().split('\0')) for child in children}
    return {int(names['RANK']): int(child) for child, names in found.items() if 'RANK' in names}


def wait_for_steps(process, out, more):
    """Waits until a run has logged so many more steps than it had."""
    log = f'{out}.partial/log.jsonl'
    steps = lambda: open(log).read().count('\n') if os.path.exists(log) else 0
    before = steps()
    while steps() < before + more:
        assert process.poll() is None, open(f'{out}.stderr').read()[-2000:]
        time.sleep(0.01)


@pytest.mark.skipif(not os.path.isdir('/proc'), reason='finds the ranks in /proc')
def test_a_run_whose_rank_is_killed_and_that_is_stopped_by_a_signal_ends_at_once_and_resumes_to_the_same_bytes(arguments, tmp_path):
    arguments = [*arguments, '--max_steps=100', '--save_interval=5', '--eval_interval=40']
    out, whole = tmp_path / 'out', torchrun(2, *arguments, f'--output_dir={tmp_path / "whole"}')
    process = torchrun(2, *arguments, '--fsdp=True')
    wait_for_steps(process, out, 8)
    os.kill(rank_of(process)[1], signal.SIGKILL)
    assert process.wait(20) == 1 and len(said(out)) == 1 and said(out)[0].startswith('fault: rank 0: lost another rank'), open(f'{out}.stderr').read()
    saved = cb_train.read_checkpoint(str(out) + '.partial/' + cb_train.CHECKPOINT, {'options': AnyOptions(), 'rows': Any(), 'base': Any()})[0]
    assert saved['step'] >= 5

    process = torchrun(2, *arguments, '--resume=True')
    wait_for_steps(process, out, 3)
    process.terminate()
    assert process.wait(20) == 1 and len(said(out)) == 1 and said(out)[0].startswith('SIGTERM: step ') and '--resume=True' in said(out)[0]

    process = torchrun(2, *arguments, '--resume=True')
    assert process.wait(120) == whole.wait(120) == 0
    assert records_of(out) == records_of(tmp_path / 'whole') and len(records_of(out)) == 100
    ours, theirs = ((folder / 'adapter' / 'adapter_model.safetensors').read_bytes() for folder in (out, tmp_path / 'whole'))
    assert ours == theirs


def test_a_mistake_under_torchrun_is_said_once(arguments, tmp_path):
    process = torchrun(2, *arguments, '--batch_size=1')
    assert process.wait(60) == 1  # torchrun's own; that of each rank is 2
    assert said(tmp_path / 'out') == ['error: 2 ranks and 1 rows of each set a step found, a row for each rank wanted']
    assert 'exitcode  : 2' in open(tmp_path / 'out.stderr').read() and not (tmp_path / 'out.partial').exists()


def test_a_resume_with_another_number_of_ranks_and_shards_without_ranks_are_refused(run, interrupted, monkeypatch):
    status, _, err = run('cb_train.py', *interrupted, '--resume=True', '--fsdp=True')
    assert status == 2 and err.count('\n') == 1 and 'torchrun' in err
    monkeypatch.setenv('WORLD_SIZE', '2')
    status, _, err = run('cb_train.py', *interrupted, '--resume=True')
    assert status == 2 and err.count('\n') == 1 and 'ranks=2 (was 1)' in err


@pytest.mark.parametrize('world', [2, 3, 4, 9, 11])
def test_ranks_share_the_rows_evenly_in_the_same_number_of_passes(ragged, world):
    model, _, rows = ragged
    shares = [list(cb_train.passes(model, rows, 3, 18, 'cpu', rank, world)) for rank in range(world)]
    tokens = [sum(int(mask.sum()) for _, mask in share) for share in shares]
    assert sum(tokens) == cb_train.count(rows) and len({len(share) for share in shares}) == 1
    assert max(tokens) - min(tokens) <= 9 and all(
        mask.numel() <= 18 and len(arguments[0]['lengths']) <= 3 for share in shares for (_, arguments), mask in share)


@pytest.fixture
def group():
    """group(backend, world): makes this process rank 0 of a process group for the length of a test."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    yield lambda backend, world: dist.init_process_group(backend, store=FakeStore() if backend == 'fake' else dist.HashStore(), rank=0, world_size=world)
    dist.destroy_process_group()


@pytest.mark.parametrize('checkpointing', [False, True])
def test_sharded_blocks_have_the_same_gradients_bit_for_bit_and_fold_alike(adapted, group, checkpointing):
    model, loras, rows = adapted
    want = losses_and_gradients(model, loras, rows, checkpointing=checkpointing)
    folded = {name: lora.base.weight + lora.delta() for name, lora in loras.items()}
    group('gloo', 1)
    cb_train.shard(model, 'cpu')
    found = losses_and_gradients(model, loras, rows, checkpointing=checkpointing)
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1]) and all(torch.equal(a, b) for a, b in zip(found[2], want[2]))
    cb_train.fold(loras.values())
    assert all(torch.equal(lora.base.weight.full_tensor(), folded[name]) for name, lora in loras.items())


@pytest.mark.parametrize('checkpointing', [False, True])
def test_sharded_blocks_gather_their_weights_once_for_both_streams_and_once_backward(adapted, group, monkeypatch, checkpointing):
    import torch.distributed as dist
    model, loras, rows = adapted
    group('fake', 2)  # sends nothing
    cb_train.shard(model, 'cpu')
    assert model.layers[0].mlp.up_proj.weight.to_local().shape == (24, 32) and loras['layers.0.self_attn.q_proj'].lora_A.shape == (4, 32)
    gathers, real = [], dist.all_gather_single
    monkeypatch.setattr(dist, 'all_gather_single', lambda *more, **named: gathers.append(1) or real(*more, **named))
    loss, _ = cb_train.retain_pass(model, *packed(model, rows), [2], checkpointing)
    assert len(gathers) == 3
    loss.backward()
    assert len(gathers) == 6
