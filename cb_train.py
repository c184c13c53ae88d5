"""
Circuit breakers (Representation Rerouting, arXiv 2406.04313): LoRA training that pushes a language model's hidden states on
harmful text away from where they were and holds its states on everything else in place; merged into the weights at the end.

    h = hidden states of the frozen model, h' = of the same model with LoRA, p = step / schedule_steps

    retain  = mean over real retain tokens, and over the states after each kept block (the last one after the final norm), of || h' - h ||
    cb      = mean over real harmful tokens, and over target_layers, of relu(cos(h', h))
    loss    = lorra_alpha * p * retain + lorra_alpha * (1 - p) * cb

Options change a term each: loss_on the tokens, cb_loss the loss of a harmful token, soft_prompts_path what stands in the request.

    python cb_train.py config/toy.py                               # a laptop, half a minute, after: python data_prep.py toy
    python cb_train.py config/llama3.py --max_steps=150            # a GPU
    torchrun --nproc_per_node=8 cb_train.py config/llama3.py       # 8 GPUs: each computes its share of every step's rows
    python cb_train.py config/llama3.py --resume=True              # after a crash or Ctrl-C: the same command and --resume=True
    python cb_train.py config/llama3.py --cb_data_path=FILE.json   # your own rows: a JSON array of {"prompt", "response"}
    python cb_train.py config/llama3.py --init_from=out/llama3/adapter --merge_only=True --output_dir=out/merged

Reads: the model (safetensors), harmful rows (cb_data_path), benign rows (retain_data_path), held-out rows (val_data_path).
Writes output_dir: the merged model, an ordinary model directory; adapter/, the LoRA in PEFT's format; README.md, its model card;
cb_config.json, every option and version; log.jsonl, the training log. All of it stands under output_dir.partial until it is complete,
with checkpoint.safetensors to resume from. Exit status: 0 merged, reloaded and equal; 1 a fault; 2 a user's mistake; 130, 143 signals.

target_layers index transformers' tuple of hidden states, as in the published code: l is the state after l blocks, 0 the embedding.
Differs from the published code (commit c0e1b05): the retain loss is divided by the real tokens and leaves the embedding out
(retain_divisor = 'published' undoes that); the schedule ticks once an optimizer step; rows are packed without pads and pass through
the tokenizer's own chat template; the merge adds in float32.

Shapes: B rows, T tokens of a row, D width, L hidden states compared, V vocabulary. A pass through the blocks is one row to them: the rows
that it takes stand in it one after the other, so there B = 1 and T counts the tokens of all. Masks are (B, T), 1 = counts.
"""
import array
import collections
import contextlib
import datetime
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import struct
import sys
import time

import huggingface_hub
import safetensors
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AutoConfig, AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from configurator import configure, fail, fault, last_word
from data_prep import BENIGN_ANSWERS, HARMFUL_ANSWERS, hub_trouble, load_rows, load_tokenizer, messages_of, numbered_rows, template_ids

# -----------------------------------------------------------------------------------------------------------------------
# model
model_name = 'meta-llama/Meta-Llama-3-8B-Instruct'  # a model directory or a hub id
num_hidden_layers = 21             # blocks kept for training, the rest is never loaded [0 = max(target_layers) + 1]
device = 'auto'                    # auto | cpu | cuda | cuda:1 | mps
dtype = 'auto'                     # of the frozen weights: auto (as stored) | float32 | bfloat16 | float16
fsdp = False                       # divide the frozen blocks among torchrun's ranks (FSDP2): for a model that does not fit one GPU
gradient_checkpointing = 'auto'    # True = recompute each block in the backward pass: less memory, a third more work; auto = if it must be
# representation rerouting
target_layers = [10, 20]           # states that the cb loss turns away
lorra_alpha = 10.0                 # weight of both losses
cb_loss = 'rr'                     # of a harmful token: rr, relu(cos(h', h)) | random, || h'/||h'|| - u || | rmu, || h' - rmu_norm u ||^2 / D
rmu_norm = 20.0                    # u is one random direction for all tokens; h' - h grows without bound where this is far from ||h||
loss_on = 'all'                    # tokens that the losses count: all (published) | response, a row's last answer | harmful_response, of harmful rows
retain_divisor = 'real'            # of the retain loss's sum: real, tokens x blocks | published, rows x max_seq_length x (blocks + 1)
use_dynamic_scheduling = True      # shift the weight from cb to retain as the run goes on; False = lorra_alpha for both throughout
schedule_steps = 0                 # steps until all of it is on retain [0 = max_steps; the published code: 300 for 150 steps]
# LoRA
lora_r = 16                        # rank
lora_alpha = 16                    # scale = lora_alpha / lora_r
lora_dropout = 0.05                # on the adapter's input
lora_b_std = 0.0                   # of lora_B at the start [0 = zero, as published: where h' = h the gradient of the cosine is zero too]
target_modules = ['q_proj', 'k_proj', 'v_proj', 'o_proj']
layers_to_transform = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]  # blocks with LoRA
# optimization
max_steps = 150                    # optimizer steps
batch_size = 4                     # rows of each set in a pass, at most
gradient_accumulation_steps = 1    # a step has so many times batch_size rows of each set
micro_batch_tokens = 0             # tokens of a pass, at most, or one row: memory against speed [0 = 512 on a CPU, 2048 elsewhere]
learning_rate = 1e-4               # constant
weight_decay = 0.0
max_grad_norm = 1.0                # the gradient is clipped to this norm
# data: .json, .jsonl, .csv, .tsv or .parquet of {"prompt", "response"} or {"messages"}, a folder of such files, or a hub id
cb_data_path = 'data/circuit_breakers_train.json'    # harmful rows; the answer may also be called output or rejected
retain_data_path = 'HuggingFaceH4/ultrachat_200k'    # benign rows; the answer may also be called completion, chosen or llama3_output
val_data_path = ''                 # a file of held-out rows with a "label", harmful or benign ['' = no validation]
num_retain_examples = 10000        # at most so many rows, drawn with the seed
num_cb_examples = 3000
max_seq_length = 512               # tokens of a row, longer ones are cut
cb_lengths = [0, 0]                # tokens of a harmful row's request and answer [0 = no limit of its own; the published code: 512,512]
soft_prompts_path = ''             # soft prompts of data_prep.py boundary: every other step, by lot, its rows hold one ['' = none]
chat_template = ''                 # a file with the chat template ['' = the tokenizer's own]
# run
init_from = ''                     # an adapter in PEFT's format to start from ['' = a fresh one]
merge_only = False                 # train nothing: merge the adapter of init_from
merge_adapter = True               # False = save the adapter alone
output_dir = 'out/cb'
overwrite = False                  # replace output_dir if an earlier run wrote it
resume = False                     # go on from the last checkpoint of a run that was stopped
seed = 0
log_interval = 10                  # steps between two lines
eval_interval = 50                 # steps between two validation passes
save_interval = 50                 # steps between two checkpoints
# -----------------------------------------------------------------------------------------------------------------------

# ---- LoRA -------------------------------------------------------------------------------------------------------------


def dropout_mask(x, p):
    """
    Which elements of x dropout leaves, each with probability 1 - p: one byte an element. A CPU draws one number after the other,
    so there 16 random bits decide on an element, which rounds p to 1 / 65536 and takes a quarter of bernoulli_'s time.
    """
    if x.device.type != 'cpu':
        return torch.empty_like(x, dtype=torch.uint8).bernoulli_(1 - p)
    bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)
    return (bits[:x.numel()] >= round(p * 65536) - 32768).view(torch.uint8).view(x.shape)


class AddLoRA(torch.autograd.Function):
    """
    y + (x * kept) A^T B^T * scale: y (N, out), x (N, in), kept (N, in) a dropout_mask or None, A (r, in), B (out, r).
    For the backward pass it keeps x as it is, which q, k and v share, and one byte an element of kept; autograd would keep x * kept.
    """

    @staticmethod
    def forward(ctx, y, x, kept, a, b, scale):
        low = (x if kept is None else x * kept) @ a.T  # (N, r)
        ctx.save_for_backward(x, kept, a, b, low)
        ctx.scale = scale
        return torch.addmm(y, low, b.T, alpha=scale)

    @staticmethod
    def backward(ctx, grad):  # (N, out)
        x, kept, a, b, low = ctx.saved_tensors
        grad_low = grad @ b * ctx.scale  # (N, r)
        grad_x = grad_low @ a if ctx.needs_input_grad[1] else None
        if kept is not None:
            x, grad_x = x * kept, grad_x if grad_x is None else grad_x * kept
        return grad, grad_x, None, grad_low.T @ x, grad.T @ low * ctx.scale, None


class LoRALinear(nn.Module):
    """
    A frozen linear layer plus a trainable low-rank delta: base(x) + lora_B(lora_A(dropout(x))) * alpha / r   (arXiv 2106.09685).
    lora_A (r, in) is Kaiming-uniform, drawn on the CPU so that no device changes it, lora_B (out, r) zero, both float32.
    `enabled = False` gives the base bit for bit.
    """

    def __init__(self, base, r, alpha, dropout):
        super().__init__()
        self.base, self.dropout, self.scale, self.enabled = base, dropout, alpha / r, True
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(r, base.in_features), a=math.sqrt(5)).to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))

    def forward(self, x):  # (B, T, in) -> (B, T, out)
        y = self.base(x)
        if not self.enabled:
            return y
        p, x = self.dropout if self.training else 0.0, x.flatten(0, -2)  # (N, in)
        kept = dropout_mask(x, p) if p else None
        return AddLoRA.apply(y.flatten(0, -2), x, kept, self.lora_A.to(x.dtype), self.lora_B.to(x.dtype), self.scale / (1 - p)).view_as(y)

    @torch.no_grad()
    def delta(self, rows=slice(None)):
        """What merging adds to some rows of the base weight, or to all: (rows, in), float32."""
        return self.lora_B[rows] @ self.lora_A * self.scale


def add_lora(model, target_modules, layers, r, alpha, dropout):
    """Freezes the model and wraps the named linears of the given blocks in place. Returns {name of the linear: LoRALinear}."""
    model.requires_grad_(False)
    loras = {}
    for i in layers:
        for name, module in list(model.layers[i].named_modules()):
            if name.rpartition('.')[2] in target_modules:
                parent = model.layers[i].get_submodule(name.rpartition('.')[0])
                lora = LoRALinear(module, r, alpha, dropout)
                setattr(parent, name.rpartition('.')[2], lora)
                loras[f'layers.{i}.{name}'] = lora
    return loras


@torch.no_grad()
def fold(loras):
    """Adds each delta to its frozen weight in memory and turns the adapter off: what merge() does in the file."""
    for lora in loras:
        weight, delta = lora.base.weight, lora.delta()
        if hasattr(weight, 'device_mesh'):  # sharded: each rank adds its own rows
            from torch.distributed.tensor import distribute_tensor
            delta = distribute_tensor(delta, weight.device_mesh, weight.placements, src_data_rank=None)
        weight.copy_(weight.float() + delta)
        lora.enabled = False


@contextlib.contextmanager
def adapter_off(module):
    """Inside, a model or a block is its own frozen reference: no second copy in memory."""
    loras = [part for part in module.modules() if isinstance(part, LoRALinear) and part.enabled]
    for lora in loras:
        lora.enabled = False
    try:
        yield
    finally:
        for lora in loras:
            lora.enabled = True


# ---- several ranks: torchrun starts this script once a GPU ------------------------------------------------------------


def summed(tensor):
    """A tensor, by now its sum over the ranks, in place; a process alone has nothing to add."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def shard(model, device):
    """
    Divides the frozen blocks among the ranks (FSDP2): each holds 1 / ranks of the weights and one block more, gathered while it computes.
    The blocks come memory-mapped from load_decoder and pass through the device one by one, so that neither a GPU nor the host's memory
    has to hold the model; LoRA stays whole on each rank, its gradients are in the step's own sum.
    """
    from torch.distributed.fsdp import fully_shard  # not above: loading it takes 0.6 s
    mesh = dist.init_device_mesh(device.partition(':')[0], (dist.get_world_size(),))
    for block in model.layers:
        fully_shard(block.to(device), mesh=mesh, reshard_after_forward=True, ignored_params={p for p in block.parameters() if p.requires_grad})


def visit(model, device):
    """Lets each block of load_decoder's mapped model come to the device for its one call and then vanish: any size fits. Returns the model."""
    for block in model.layers:
        block.register_forward_pre_hook(lambda block, _: block.to(device) and None)  # what a hook returns would replace its input
        block.register_forward_hook(lambda block, *_: block.to('meta') and None)
    return model


# ---- the two streams and the two losses -------------------------------------------------------------------------------


def packed_attention(module, q, k, v, attention_mask, lengths=None, sliding_window=None, **kwargs):
    """
    Attention of packed rows by transformers' interface: q (B, heads, T, d), k and v (B, key heads, T, d) -> (B, T, heads, d), None. torch's
    kernel gets each row by itself, so nothing is computed between two rows, and causal, so it needs no mask but for a row longer
    than a sliding window. lengths: of the rows along T [None = one]. ValueError where a family has a mask of its own.
    """
    if attention_mask is not None:
        raise ValueError('packed rows have no mask')
    heads = []
    for part in zip(*(x.split(lengths or x.shape[2], 2) for x in (q, k, v))):
        T, window = part[0].shape[2], None
        if sliding_window and T > sliding_window:
            window = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(1 - sliding_window)
        heads.append(sdpa_attention_forward(module, *part, window, **kwargs)[0])
    return torch.cat(heads, 1) if len(heads) > 1 else heads[0], None


AttentionInterface.register('packed', packed_attention)


@torch.no_grad()
def block_inputs(model, ids, lengths, soft=None):
    """
    What transformers hands to its blocks for packed rows, ids (1, T) and the lengths of the rows in it: the first block's input (1, T, D)
    and every block's keyword arguments, in which each row has its own positions. Embedding scale, rotary angles and masks are thus the
    family's own; packed_attention and flash attention get the lengths instead of a mask. Nothing is computed: the blocks only listen, in
    place of their whole call, or FSDP's hooks would gather their weights.
    soft (S, D): embeddings for the S places of each row where ids are -1 (see opened).
    """
    calls, kind, more = [], model.config._attn_implementation, {}
    positions = torch.tensor([[i for n in lengths for i in range(n)]]).to(ids.device, non_blocking=ids.is_cuda)  # (1, T)
    if kind == 'packed':
        more = {'lengths': lengths}
    elif kind.startswith('flash'):  # told here, it does not read the positions back from the device in every block
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(ids.device, non_blocking=ids.is_cuda)
        more = {'cu_seq_lens_q': ends, 'cu_seq_lens_k': ends, 'max_length_q': max(lengths), 'max_length_k': max(lengths)}

    def listen(h, **kwargs):
        calls.append((h, {**kwargs, **more}))
        return h

    for block in model.layers:
        block._call_impl = listen
    try:
        if soft is None:
            model(input_ids=ids, position_ids=positions, use_cache=False)
        else:
            x = model.get_input_embeddings()(ids.clamp(min=0))  # (1, T, D)
            x[ids < 0] = soft.to(x.dtype).repeat(len(lengths), 1)
            model(inputs_embeds=x, position_ids=positions, use_cache=False)
    finally:
        for block in model.layers:
            del block._call_impl
    return calls[0][0], [kwargs for _, kwargs in calls]


def streams(model, inputs, last, checkpointing=False):
    """
    Runs the first `last` blocks twice, side by side: without the adapter and without gradient (h), and with it (h').
    inputs: what block_inputs gives. Yields (l, h, h') after l = 1..last blocks, each state (B, T, D); l = all blocks is taken
    after the final norm, as transformers' hidden_states is.
    """
    h, arguments = inputs  # (B, T, D)
    h_lora = h
    for l, block in enumerate(model.layers[:last], 1):
        drop_weights = getattr(block, 'set_reshard_after_forward', lambda drop: None)
        drop_weights(False)  # a sharded block gathers them once for both streams
        with torch.no_grad(), adapter_off(block):
            h = block(h, **arguments[l - 1])
        drop_weights(True)
        if checkpointing:
            h_lora = checkpoint(block, h_lora, **arguments[l - 1], use_reentrant=False)
        else:
            h_lora = block(h_lora, **arguments[l - 1])
        final = l == len(model.layers)
        yield l, model.norm(h) if final else h, model.norm(h_lora) if final else h_lora


class Distance(torch.autograd.Function):
    """
    || h' - h ||, (B, T, D) twice -> the sum over the tokens that count, float32. Its gradient, the unit vector (zero at h' = h), is
    taken at once and kept in the type of h'; autograd would keep the difference in float32.
    """

    @staticmethod
    def forward(ctx, h, h_lora, mask):
        difference = h_lora.float() - h.float()
        norm = difference.norm(dim=-1)  # (B, T)
        ctx.save_for_backward((difference * (mask / norm).where(norm > 0, 0).unsqueeze(-1)).to(h_lora.dtype))
        return (norm * mask).sum()

    @staticmethod
    def backward(ctx, grad):
        return None, ctx.saved_tensors[0] * grad, None


def cosine(h, h_lora, mask):
    """cos(h', h) of each token: (B, T, D) twice -> (B, T) float32, zero where the mask is; bfloat16 would be off by 0.008."""
    return F.cosine_similarity(h_lora.float(), h.float(), dim=-1) * mask


@torch.no_grad()
def states(model, ids):
    """transformers' own hidden states after each block: ids (B, T) -> L states (B, T, D)."""
    return model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[1:]


def farthest(theirs, ours):
    """The largest relative distance between two lists of states (B, T, D), over the states of the list: a check, not a loss."""
    return max((((b.float() - a.float()).norm()) / a.float().norm()).item() for a, b in zip(theirs, ours))


@torch.no_grad()
def can_pack(model, probe):
    """
    Chooses the attention of all passes: our walk through the blocks must give transformers' own states, by its own attention, within
    rounding. True: it does for packed rows, probe (2, T). False: only for one row a pass, because the family's attention or
    recurrence mixes packed rows, or, eager, would keep every pair of their tokens. Ends with one line if for neither.
    """
    library, limit = model.config._attn_implementation, 1e-5 if model.dtype == torch.float32 else 2e-2
    for rows in (probe, probe[:1]) if library != 'eager' else (probe[:1],):
        want = states(model, rows)
        model.set_attn_implementation('packed' if len(rows) > 1 and library == 'sdpa' else library)
        try:
            found = streams(model, block_inputs(model, rows.view(1, -1), [rows.shape[1]] * len(rows)), len(model.layers))
            off = farthest(want, [h.view(*rows.shape, -1) for _, h, _ in found])
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # a family's blocks may refuse packed rows in any way
            off = f'{type(e).__name__}'
        if not isinstance(off, str) and off <= limit:
            return len(rows) > 1
        model.set_attn_implementation(library)
    fail(f'model_name: {type(model).__name__} computes its blocks in another way than this script ({off}, a relative difference of {limit} at most wanted)')


def retain_pass(model, inputs, mask, target_layers, checkpointing=False):
    """inputs of rows (B, T), their mask -> the sum over real tokens of: the mean distance over all L states; the mean cosine at target_layers."""
    loss, cos = 0, 0
    for l, h, h_lora in streams(model, inputs, len(model.layers), checkpointing):
        loss = loss + Distance.apply(h, h_lora, mask) / len(model.layers)
        if l in target_layers:
            cos = cos + cosine(h, h_lora.detach(), mask).sum() / len(target_layers)
    return loss, cos


def towards(cb_loss, u, rmu_norm=0.0):
    """
    The losses that the paper compares rerouting with, as a function of h' (B, T, D) -> (B, T): h' is drawn to one direction u (D,).
    random: its unit vector is ("RandP", section 4); rmu: h' itself, to rmu_norm u (arXiv 2403.03218).
    """
    if cb_loss == 'random':
        return lambda h_lora: (F.normalize(h_lora.float(), dim=-1) - u).norm(dim=-1)
    return lambda h_lora: (h_lora.float() - rmu_norm * u).square().mean(-1)


def cb_pass(model, inputs, mask, target_layers, checkpointing=False, token_loss=None):
    """
    inputs of rows (B, T), their mask -> the sum over real tokens of the mean over target_layers of: relu(cosine), or
    token_loss(h'); cosine.
    """
    loss, cos = 0, 0
    for l, h, h_lora in streams(model, inputs, max(target_layers), checkpointing):
        if l in target_layers:
            c = cosine(h, h_lora, mask)  # (B, T)
            loss = loss + (token_loss(h_lora) * mask if token_loss else c.relu()).sum() / len(target_layers)
            cos = cos + c.detach().sum() / len(target_layers)
    return loss, cos


def passes(model, rows, batch_size, micro_batch_tokens, device, rank=0, world=1, soft=None):
    """
    Splits rows into passes of at most batch_size rows and micro_batch_tokens tokens, or of one row. Yields (inputs, mask) of each, as
    retain_pass and cb_pass want them.
    Of many ranks each gets one of every `world` rows, dealt by length, there and back, so that their tokens are about equal. All have the
    same number of passes, which FSDP needs: a rank without a row in one computes a token that does not count. soft: as in block_inputs.
    """
    rows, batches = sorted(rows, key=lambda row: -len(row.ids)), []
    for i in range(0, len(rows), world):  # a row for each rank
        longest = len(rows[i].ids)
        if not batches or len(batches[-1]) == batch_size or tokens + longest > micro_batch_tokens:
            tokens, batches = 0, [*batches, []]
        tokens += longest
        batches[-1].append(rows[i:i + world][::(-1) ** (i // world)])
    for batch in batches:
        places = 0 if soft is None else len(soft)
        ids, mask, lengths = pack([dealt[rank] for dealt in batch if rank < len(dealt)] or [Row([0] + [-1] * places, 1 + places)], device)
        yield block_inputs(model, ids, lengths, soft), mask


def add_gradient(run, model, batches, target_layers, weight, checkpointing=False):
    """
    Adds the gradient of weight times the loss, summed over all `batches` (inputs, mask); one pass's graph is alive at a time.
    run: retain_pass or cb_pass. Returns the sums of loss and cosine, as tensors: nothing waits for the device.
    """
    loss_sum, cos_sum = 0, 0
    for inputs, mask in batches:
        loss, cos = run(model, inputs, mask, target_layers, checkpointing)
        (weight * loss).backward()
        loss_sum, cos_sum = loss_sum + loss.detach(), cos_sum + cos
    return loss_sum, cos_sum


def bytes_kept(model, ids):
    """What the backward pass of retain_pass keeps of each token, in bytes, without checkpointing: counted on rows ids (B, T) as autograd keeps it."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.random.fork_rng([ids.device] if ids.is_cuda else []), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        inputs = block_inputs(model, ids.view(1, -1), [ids.shape[1]] * len(ids))
        graph = retain_pass(model, inputs, torch.ones(1, ids.numel(), device=ids.device), [])  # alive: no address comes twice
    return sum(size for address, size in kept.items() if address not in weights) / ids.numel()


def memory_at_hand(device):
    """The bytes that can still be allocated on a device."""
    if device.startswith('cuda'):
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device == 'mps':
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if os.path.exists('/proc/meminfo'):
        with open('/proc/meminfo') as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith('MemAvailable'))
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // 2


def plan(model, probe, longest, batch_size, micro_batch_tokens, gradient_checkpointing):
    """
    What a pass may hold and whether its blocks are computed again in the backward pass: (tokens, True or False, why). 'auto' does
    that where the graph of the largest pass would take more than half of the memory at hand. longest: tokens of the longest row.
    """
    device = str(probe.device)
    tokens = micro_batch_tokens or (512 if device == 'cpu' else 2048)
    if gradient_checkpointing != 'auto':
        return tokens, gradient_checkpointing == 'True', 'as the option says'
    if hasattr(model.layers[0], 'unshard'):
        return tokens, True, 'the model is sharded'
    if model.config._attn_implementation == 'eager':
        return tokens, True, 'eager attention keeps every pair of tokens'
    need, free = bytes_kept(model, probe) * max(longest, min(tokens, longest * batch_size)), memory_at_hand(device)
    return tokens, need > free / 2, f'the graph of the largest pass takes {need / 2**30:.2g} GiB, {free / 2**30:.2g} GiB are at hand'


@torch.no_grad()
def validate(model, rows, loras, target_layers, batch_size, micro_batch_tokens, device, rank, world, run_cb=cb_pass):
    """The fifth pass: the losses and cosines of held-out rows {'benign', 'harmful': [Row]}, without dropout. Returns {name: mean}."""
    for lora in loras:
        lora.eval()
    means = {}
    for name, run, some in (('retain', retain_pass, rows['benign']), ('cb', run_cb, rows['harmful'])):
        sums = [run(model, *batch, target_layers) for batch in passes(model, some, batch_size, micro_batch_tokens, device, rank, world)]
        sums = summed(torch.tensor([float(sum(column)) for column in zip(*sums)], dtype=torch.float64)) / count(some)
        means[f'val_{name}_loss'], means[f'val_{name}_cos'] = sums.tolist()
    for lora in loras:
        lora.train()
    return means


def coefficients(step, lorra_alpha, schedule_steps):
    """(retain, cb) at an optimizer step, both lorra_alpha if schedule_steps is 0 (section 3 of the paper)."""
    if not schedule_steps:
        return lorra_alpha, lorra_alpha
    p = min(step / schedule_steps, 1.0)
    return lorra_alpha * p, lorra_alpha * (1 - p)


# ---- data -------------------------------------------------------------------------------------------------------------


Row = collections.namedtuple('Row', 'ids start where', defaults=('',))  # its tokens, the first of them that the losses count, FILE: row N
Work = collections.namedtuple('Work', 'name run rows soft batches coeff divisor tokens')  # one set's part of a step


def labelled(row):
    """A row of val_data_path: (label, conversation); ValueError says what is wrong."""
    if not isinstance(row, dict) or row.get('label') not in ('benign', 'harmful'):
        raise ValueError('a "label", benign or harmful, wanted')
    return row['label'], messages_of(row, HARMFUL_ANSWERS if row['label'] == 'harmful' else BENIGN_ANSWERS)


def encode(tokenizer, messages, where, max_seq_length, loss_on='all', lengths=(0, 0)):
    """
    A conversation as a Row through the chat template, cut to max_seq_length tokens and, with lengths (request, answer), each
    part to its own. None if no token is left that counts; ValueError if the template refuses it.
    """
    ids, start = template_ids(tokenizer, messages), 0
    if loss_on == 'response' or any(lengths):  # the answer starts where the request, put alone, stops being the same
        request = template_ids(tokenizer, messages, answer=False)
        start = next((i for i, (a, b) in enumerate(zip(ids, request)) if a != b), min(len(ids), len(request)))
        parts = [part[:limit or len(part)] for part, limit in zip((ids[:start], ids[start:]), lengths)]
        ids, start = parts[0] + parts[1], len(parts[0])
    row = Row(ids[:max_seq_length], start if loss_on == 'response' else 0, where)
    return row if row.start < len(row.ids) else None


def encode_all(tokenizer, conversations, option, *more):
    """
    encode for a whole set of (where, messages), as a list of Rows, from the cache if the same was encoded before; ends with one line
    if the template refuses one or nothing is left.
    """
    path = cache_path(tokenizer, conversations, more)
    rows = read_rows(path, [where for where, _ in conversations])
    if rows is None:
        rows = []
        for where, messages in tqdm(conversations, desc=f'tokenize {option}', disable=None):
            try:
                rows.append(encode(tokenizer, messages, where, *more))
            except ValueError as e:
                fail(f'{where}: {e}')
        write_rows(path, rows)
    dropped = rows.count(None)
    if dropped:
        print(f'{option}: {dropped} of {len(rows)} rows left out: none of their tokens that count is among the first {more[0]}')
    return [row for row in rows if row] or fail(f'{option}: no rows left of {len(rows)}')


def cache_path(tokenizer, conversations, more):
    """The file of the cache for these conversations: its name is a hash of all that decides on their token ids, this code too."""
    digest = hashlib.sha256(json.dumps([transformers.__version__, tokenizers.__version__, tokenizer.chat_template, more,
                                        [messages for _, messages in conversations]]).encode())
    folder = tokenizer.name_or_path
    files = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if not name.endswith(('.safetensors', *OTHER_WEIGHTS))]
    for path in (*(path for path in files if os.path.isfile(path)), encode.__code__.co_filename, template_ids.__code__.co_filename):
        with open(path, 'rb') as f:
            digest.update(f.read())
    return os.path.join(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'circuit-breakers', digest.hexdigest())


def read_rows(path, wheres):
    """The rows that write_rows left in a file, with where each comes from; None if there is no such file or it is not whole."""
    try:
        with open(path, 'rb') as f:
            checksum, data = f.read(32), f.read()
        os.utime(path)
    except OSError:
        return None
    if hashlib.sha256(data).digest() != checksum:
        return None
    numbers, rows, n = array.array('i', data), [], len(wheres)
    begin = 2 * n
    for length, start, where in zip(numbers[:n], numbers[n:2 * n], wheres):
        rows.append(Row(numbers[begin:begin + length].tolist(), start, where) if length else None)
        begin += length
    return rows


def write_rows(path, rows, most=32):
    """
    Keeps rows, None among them, in a file: a checksum, then as 32-bit numbers their lengths, their starts, their ids. Written under
    another name, then renamed. Of all files in the folder the `most` last used stay. A disk that refuses is no reason to stop.
    """
    data = array.array('i', [len(row.ids) if row else 0 for row in rows] + [row.start if row else 0 for row in rows])
    for row in rows:
        data.extend(row.ids if row else [])
    folder, data = os.path.dirname(path), data.tobytes()
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        with open(f'{path}.{os.getpid()}', 'wb') as f:
            f.write(hashlib.sha256(data).digest() + data)
        os.replace(f'{path}.{os.getpid()}', path)
        for name in sorted(os.listdir(folder), key=lambda name: os.path.getmtime(os.path.join(folder, name)))[:-most]:
            os.remove(os.path.join(folder, name))
    except OSError:
        pass


def rows_digest(sets):
    """A hash of the rows of some sets, as a checkpoint keeps it: of their token ids and of where they start to count."""
    digest = hashlib.sha256()
    for rows in sets:
        for row in rows:
            digest.update(array.array('i', [len(row.ids), row.start, *row.ids]))
    return digest.hexdigest()


def count(rows):
    """The tokens of some rows that the losses count."""
    return sum(len(row.ids) - row.start for row in rows)


def read_soft_prompts(path, width):
    """The soft prompts of data_prep.py boundary: K times (S, D), float32; ends with one line if the file is none of the model's width D."""
    try:
        soft = load_file(path)['soft_prompts'].float()
    except (OSError, KeyError, safetensors.SafetensorError) as e:
        fail(f'soft_prompts_path: {path}: not a file of soft prompts ({type(e).__name__}); make one with: python data_prep.py boundary')
    if soft.dim() != 3 or soft.shape[2] != width:
        fail(f'soft_prompts_path: {path}: soft prompts of shape {list(soft.shape)} found, [prompts, tokens, {width}] wanted, as wide as the model')
    return soft


def opened(row, places, lot):
    """A Row with so many places for soft tokens somewhere behind its first token, in front of the tokens that count if not all do."""
    at = lot.randint(1, row.start or len(row.ids))
    return Row(row.ids[:at] + [-1] * places + row.ids[at:], row.start and row.start + places, row.where)


def pack(rows, device):
    """Rows one after the other: their ids (1, T), the mask of the tokens that count (1, T), and the rows' lengths."""
    ids = torch.tensor([[token for row in rows for token in row.ids]])
    mask = torch.tensor([[float(i >= row.start) for row in rows for i in range(len(row.ids))]])
    return *(x.to(device, non_blocking=device.startswith('cuda')) for x in (ids, mask)), [len(row.ids) for row in rows]


def batch_at(rows, step, size, seed):
    """The `size` rows of a step: the set is shuffled anew each time it has been gone through, and any step can be asked for."""
    batch = []
    for i in range(step * size, (step + 1) * size):
        epoch, position = divmod(i, len(rows))
        if not batch or position == 0:
            order = random.Random(f'{seed} {epoch}').sample(range(len(rows)), len(rows))
        batch.append(rows[order[position]])
    return batch


# ---- the checkpoint: truncated load, merge, adapter -------------------------------------------------------------------

TORCH_DTYPES = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}
OF_A_RUN = ('README.md', 'adapter', 'cb_config.json', 'log.jsonl', 'eval.json', 'eval.jsonl.partial', 'generations.jsonl', 'attacks.png', 'training.png',
            'states.png', 'best_of_n.png')  # what this project writes beside a model's own files
OTHER_WEIGHTS = ('.bin', '.pt', '.pth', '.gguf', '.h5', '.msgpack', '.onnx', '.ckpt')


def find_checkpoint(model_name):
    """The local directory of a model: itself, or the hub's snapshot (safetensors and small files only)."""
    if os.path.isdir(model_name):
        return model_name
    if not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', model_name):
        fail(f'model_name={model_name}: there is no such directory, and it is no hub id')
    try:
        return huggingface_hub.snapshot_download(model_name, ignore_patterns=[f'*{end}' for end in OTHER_WEIGHTS] + ['original/*', 'consolidated*'])
    except Exception as e:
        fail(f'model_name={model_name}: there is no such directory, and {hub_trouble(e)}')


def shards(model_dir):
    """The names of the safetensors files that hold the model's weights, all of them in model_dir itself."""
    index, names = os.path.join(model_dir, 'model.safetensors.index.json'), ['model.safetensors']
    if os.path.exists(index):
        try:
            names = sorted(set(json.load(open(index, encoding='utf-8'))['weight_map'].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
            fail(f'{index}: truncated or corrupt ({type(e).__name__}); an index of safetensors files wanted')
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or not os.path.isfile(os.path.join(model_dir, name)):
            fail(f'{model_dir}: there is no weight file {name}; a model in safetensors is wanted')
    return names


def read_header(path):
    """The header of a safetensors file: ({tensor: {dtype, shape, data_offsets}}, where the data start in bytes)."""
    size = os.path.getsize(path)
    try:
        with open(path, 'rb') as f:
            length = struct.unpack('<Q', f.read(8))[0]
            header = json.loads(f.read(length)) if length <= size else None
        header.pop('__metadata__', None)
        complete = 8 + length + max(tensor['data_offsets'][1] for tensor in header.values()) == size
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, struct.error):
        complete = False
    if not complete:
        fail(f'{path}: truncated or corrupt; a whole safetensors file wanted: copy or download it again')
    return header, 8 + length


def stored_name(names, linear):
    """The checkpoint's name for the weight of a decoder's linear: 'model.layers.0...' for 'layers.0...'."""
    found = [name for name in names if f'.{name}'.endswith(f'.{linear}.weight')]
    if len(found) != 1:
        fail(f'the checkpoint has {len(found)} tensors called {linear}.weight, one is wanted')
    return found[0]


def truncated_config(model_dir, blocks):
    """The model's config with only the first `blocks` blocks, and the number of blocks that there are."""
    config = AutoConfig.from_pretrained(model_dir)
    total = config.num_hidden_layers
    for name, value in config.to_dict().items():  # Qwen, Gemma (layer_types) and SmolLM3 (no_rope_layers) keep one entry a block
        if isinstance(value, list) and len(value) == total:
            setattr(config, name, value[:blocks])
    config.num_hidden_layers = blocks
    return config, total


def attention(dtype, device):
    """The attention that transformers is asked for: flash-attn where it is installed and can run, or None, the library's choice."""
    flash = dtype in ('bfloat16', 'float16') and device.startswith('cuda') and importlib.util.find_spec('flash_attn')
    return 'flash_attention_2' if flash else None


def load_decoder(model_dir, blocks, dtype, device, mapped=False):
    """
    The first `blocks` blocks of the decoder with its embedding and final norm, without the head; the rest is never read. mapped: the
    blocks stay on the CPU, mapped from the files: pages that all ranks share and the system may drop (in another dtype than stored, copies).
    """
    config, total = truncated_config(model_dir, blocks)
    stored = str(getattr(config, 'dtype', None) if dtype == 'auto' else dtype).rpartition('.')[2]
    model, report = AutoModel.from_pretrained(model_dir, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True,
                                              attn_implementation=attention(stored, device))
    dropped = re.compile(rf'(^|\.)(lm_head\.|layers\.({"|".join(map(str, range(blocks, total)))})\.)')
    wrong = [*report['missing_keys'], *report['mismatched_keys'], *(key for key in report['unexpected_keys'] if not dropped.search(key))]
    if wrong:
        fail(f'{model_dir}: {len(wrong)} weights are missing or do not fit, the first is {wrong[0]}')
    for module in model.children():
        if module is not model.layers or not mapped:
            module.to(device)
    return model.eval()


def copy_bytes(source, target, size):
    """Copies the next `size` bytes of an open, unbuffered file to another; whole pages inside the kernel where Linux can, as cp does."""
    while size > 0:
        over = source.tell() % 4096
        if sys.platform == 'linux' and not over and size >= 4096:
            done = os.sendfile(target.fileno(), source.fileno(), None, size - size % 4096)
        else:
            done = target.write(source.read(min(size, 4096 - over if sys.platform == 'linux' else 1 << 24)))
        if not done:
            raise OSError(f'{source.name} ended early, while it was copied')
        size -= done


def merge(model_dir, output_dir, deltas):
    """
    Writes output_dir: every file of model_dir as it is, but for the weights in deltas, {linear: function of a slice of rows that
    gives what is added to them, (rows, in) float32}; added in float32, cast once to the stored dtype. Every byte is written once
    and a few rows are in memory at a time, whatever the model's size. Left behind are weights in other formats, the model card,
    and what an earlier run of this script wrote beside a model.
    """
    names = shards(model_dir)
    shutil.copytree(model_dir, output_dir, dirs_exist_ok=True, copy_function=shutil.copyfile, ignore=lambda folder, files: [
        f for f in files if f.startswith('.') or f.endswith(OTHER_WEIGHTS + ('.safetensors',)) or f in OF_A_RUN])
    headers = {shard: read_header(os.path.join(model_dir, shard)) for shard in names}
    stored = {name for header, _ in headers.values() for name in header}
    linear_of = {stored_name(stored, linear): linear for linear in deltas}
    for shard, (header, start) in tqdm(headers.items(), desc='merge', disable=None):
        with open(os.path.join(model_dir, shard), 'rb', 0) as source, open(os.path.join(output_dir, shard), 'wb', 0) as target:
            for name in sorted(linear_of.keys() & header.keys(), key=lambda name: header[name]['data_offsets']):
                (begin, end), (out, fan_in) = header[name]['data_offsets'], header[name]['shape']
                copy_bytes(source, target, start + begin - source.tell())
                for row in range(0, out, 128):
                    data = bytearray(source.read(min(128, out - row) * (end - begin) // out))
                    weight = torch.frombuffer(data, dtype=TORCH_DTYPES[header[name]['dtype']]).view(-1, fan_in)  # (rows, in)
                    merged = weight.float() + deltas[linear_of[name]](slice(row, row + 128)).cpu()
                    target.write(merged.to(weight.dtype).view(torch.uint8).numpy())
            copy_bytes(source, target, os.path.getsize(source.name) - source.tell())
            if target.tell() != source.tell():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target.name)


def save_adapter(folder, loras, model_name, r, alpha, dropout):
    """The LoRA in PEFT's format: adapter_model.safetensors and adapter_config.json."""
    os.makedirs(folder, exist_ok=True)
    tensors = {f'base_model.model.model.{name}.{part}.weight': getattr(lora, part).detach().cpu().contiguous()
               for name, lora in loras.items() for part in ('lora_A', 'lora_B')}
    save_file(tensors, os.path.join(folder, 'adapter_model.safetensors'), metadata={'format': 'pt'})
    write_json(os.path.join(folder, 'adapter_config.json'), {
        'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': model_name, 'r': r, 'lora_alpha': alpha,
        'lora_dropout': dropout, 'bias': 'none', 'inference_mode': True, 'target_modules': sorted({name.rpartition('.')[2] for name in loras}),
        'layers_to_transform': sorted({int(name.split('.')[1]) for name in loras}), 'layers_pattern': 'layers'})


def read_adapter(folder, shapes, r, alpha):
    """
    An adapter in PEFT's format, this project's or peft's own, as {linear: (lora_A (r, in), lora_B (out, r))}. Ends with one line
    if it is none or is not what the options say; shapes: {linear: (out, in)}.
    """
    try:
        config = dict(json.load(open(os.path.join(folder, 'adapter_config.json'), encoding='utf-8')))
        stored = {re.sub(r'^.*?(?=layers\.\d)', '', name): tensor for name, tensor in load_file(os.path.join(folder, 'adapter_model.safetensors')).items()}
    except (OSError, ValueError, TypeError, safetensors.SafetensorError) as e:
        fail(f'init_from: {folder}: no adapter in PEFT\'s format ({type(e).__name__}); adapter_config.json and adapter_model.safetensors wanted')
    for key, plain in (('peft_type', 'LORA'), ('bias', 'none'), ('use_dora', False), ('use_rslora', False), ('rank_pattern', {}),
                       ('alpha_pattern', {}), ('modules_to_save', None), ('lora_alpha', alpha), ('r', r)):
        if (config.get(key, plain) or None) != (plain or None):
            fail(f'init_from: {folder}: {key}={config[key]!r} found, {plain!r} wanted')
    wanted = {f'{name}.{part}.weight': shape for name, (out, fan_in) in shapes.items() for part, shape in (('lora_A', (r, fan_in)), ('lora_B', (out, r)))}
    for name in sorted(wanted.keys() ^ stored.keys()):
        fail(f'init_from: {folder}: {name} is ' + ('missing' if name in wanted else 'there, but not among target_modules and layers_to_transform'))
    for name, shape in wanted.items():
        if tuple(stored[name].shape) != shape:
            fail(f'init_from: {folder}: {name} is {tuple(stored[name].shape)}, {shape} wanted; is it of another model?')
    return {name: tuple(stored[f'{name}.{part}.weight'].float() for part in ('lora_A', 'lora_B')) for name in shapes}


def model_card(c, counts, last):
    """README.md of output_dir, for the hub: base, recipe, data counts ({set: rows}), the last logged step ({} = nothing trained), date."""
    hub_id = not os.path.isdir(c['model_name'])
    recipe = ('target_layers', 'lorra_alpha', 'use_dynamic_scheduling', 'schedule_steps', 'lora_r', 'lora_alpha', 'lora_dropout', 'target_modules',
              'max_steps', 'batch_size', 'gradient_accumulation_steps', 'learning_rate', 'max_seq_length', 'loss_on', 'retain_divisor', 'seed')
    lines = ['---', *([f'base_model: {c["model_name"]}'] if hub_id else []), 'library_name: transformers', 'pipeline_tag: text-generation',
             'tags: [circuit-breakers, representation-rerouting]', '---', f'# {os.path.basename(os.path.abspath(c["output_dir"]))}', '',
             f'{c["model_name"] if hub_id else "A local model"} with circuit breakers (Representation Rerouting, arXiv 2406.04313), '
             f'{"merged into its weights" if c["merge_adapter"] else "as a LoRA adapter in adapter/"}, made on {datetime.date.today()}.', '',
             '| option | value |', '|---|---|', *(f'| {name} | {c[name]} |' for name in recipe), '']
    if c['merge_only']:
        lines += [f'Nothing was trained in this run: it merged the adapter of `{c["init_from"]}`.', '']
    else:
        lines += [f'Trained on {", ".join(f"{n} {name} rows" for name, n in counts.items())}; at the last step retain_loss {last["retain_loss"]:.4f}, '
                  f'cb_loss {last["cb_loss"]:.4f}. Every option and version: cb_config.json; the log: log.jsonl.', '']
    return '\n'.join(lines + ['## Evaluation', '', 'Not evaluated yet: run cb_eval.py.', ''])


def write_json(path, value):
    """Writes a value as indented JSON."""
    with open(path, 'w', encoding='utf-8') as f:
        f.write(json.dumps(value, indent=2) + '\n')


# ---- a run that cannot be lost ----------------------------------------------------------------------------------------

CHECKPOINT = 'checkpoint.safetensors'
MAY_DIFFER = ('resume', 'overwrite', 'output_dir', 'merge_adapter', 'log_interval', 'eval_interval', 'save_interval',  # between a run and its resume
              'gradient_checkpointing', 'micro_batch_tokens', 'fsdp')


def save_checkpoint(path, named_loras, optimizer, state, rank, world):
    """
    One safetensors file: LoRA, AdamW's moments, random states of every rank (world, bytes), and `state` (JSON) in its header. Written
    by rank 0 beside the last good one, synced, then renamed over it.
    """
    device = next(iter(named_loras.values())).lora_A.device
    random_states = {'random.cpu': torch.get_rng_state()} | ({'random.cuda': torch.cuda.get_rng_state(device)} if device.type == 'cuda' else {})
    tensors = {name: summed(torch.stack([own * (r == rank) for r in range(world)])) for name, own in random_states.items()}
    if rank:
        return
    for name, lora in named_loras.items():
        for part in ('lora_A', 'lora_B'):
            parameter = getattr(lora, part)
            tensors |= {f'{name}.{part}': parameter.detach(), **{f'{name}.{part}.{key}': value for key, value in optimizer.state[parameter].items()}}
    save_file(tensors, path + '.new', metadata={'state': json.dumps(state)})
    with open(path + '.new', 'rb') as f:
        os.fsync(f.fileno())
    os.replace(path + '.new', path)


def read_checkpoint(path, wanted):
    """(state, tensors) of save_checkpoint; ends with one line if the file is broken or its state is not of the run that is `wanted`."""
    try:
        with safetensors.safe_open(path, 'pt') as f:
            state, tensors = json.loads(f.metadata()['state']), {name: f.get_tensor(name) for name in f.keys()}
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as e:
        fail(f'{path}: truncated or corrupt ({type(e).__name__}); start the run anew with --overwrite=True')
    differ = differing(wanted['options'], state['options']) + [f'the {name} changed' for name in ('rows', 'base') if state[name] != wanted[name]]
    if differ:
        another_run(path, differ)
    return state, tensors


def another_run(path, differ):
    """Refuses to resume a run under options, rows or a base that are not its own."""
    fail(f'resume: this is another run than {path}: {"; ".join(differ)}; give the options of that run, or start anew with --overwrite=True')


def differing(options, found):
    """What differs, for people, between the options of this run and those `found` of an earlier one, apart from MAY_DIFFER."""
    return [f'{name}={options[name]!r} (was {value!r})' for name, value in found.items()
            if name in options and name not in MAY_DIFFER and options[name] != value]


def restore(tensors, named_loras, optimizer, rank):
    """Puts the tensors of a checkpoint back: LoRA, moments, the random states of this rank."""
    for name, lora in named_loras.items():
        for part in ('lora_A', 'lora_B'):
            parameter, prefix = getattr(lora, part), f'{name}.{part}.'
            parameter.data.copy_(tensors[prefix[:-1]])
            optimizer.state[parameter] = {key[len(prefix):]: value.to(parameter.device) if value.dim() else value
                                          for key, value in tensors.items() if key.startswith(prefix)}
    torch.set_rng_state(tensors['random.cpu'][rank].clone())  # torch misreads a view
    if 'random.cuda' in tensors:
        torch.cuda.set_rng_state(tensors['random.cuda'][rank].clone(), lora.lora_A.device)


def finish(output_dir):
    """Removes what a complete run no longer needs: the output that it replaced (check_writable made sure it is one), its checkpoint."""
    shutil.rmtree(output_dir + '.old', ignore_errors=True)
    if os.path.exists(os.path.join(output_dir, CHECKPOINT)):
        os.remove(os.path.join(output_dir, CHECKPOINT))


def base_files(model_dir):
    """What tells whether the base was changed: {file: [bytes, time of the last change in ns]} of its weights and config."""
    files = ['config.json', *shards(model_dir)]
    return {name: [(stat := os.stat(os.path.join(model_dir, name))).st_size, stat.st_mtime_ns] for name in files}


def open_log(path):
    """log.jsonl, to append to; as long as it is open no other run can have it. Ends with one line if another has."""
    log = open(path, 'a', encoding='utf-8')
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        fail(f'output_dir: another run is writing {path}; wait for it or choose another')
    return log


def stop_now(number, frame):
    """The handler of SIGINT and SIGTERM outside the training loop."""
    last_word(f'{signal.Signals(number).name}: stopped; a checkpoint, if there is one, is whole: go on with the same command and --resume=True')
    sys.exit(128 + number)


# ---- checks before anything is loaded or written ----------------------------------------------------------------------


def check_options(c, ranks=1):
    """Ends with one line if the options (a dict) contradict each other, the machine or the number of ranks."""
    rows_a_step, gpus = c['batch_size'] * c['gradient_accumulation_steps'], torch.cuda.device_count()
    checks = [(f'{name}={c[name]}', 'at least 1', c[name] >= 1) for name in
              ('lora_r', 'lora_alpha', 'max_steps', 'batch_size', 'gradient_accumulation_steps', 'num_retain_examples', 'num_cb_examples',
               'max_seq_length', 'log_interval', 'eval_interval', 'save_interval')]
    checks += [(f'{name}={c[name]}', 'at least 0', c[name] >= 0) for name in
               ('num_hidden_layers', 'micro_batch_tokens', 'lorra_alpha', 'schedule_steps', 'weight_decay', 'lora_b_std', 'rmu_norm', 'seed')]
    checks += [(f'{name}={c[name]}', 'more than 0', c[name] > 0) for name in ('learning_rate', 'max_grad_norm')]
    checks += [(f'loss_on={c["loss_on"]}', 'all, response or harmful_response', c['loss_on'] in ('all', 'response', 'harmful_response')),
               (f'cb_loss={c["cb_loss"]}', 'rr, random or rmu', c['cb_loss'] in ('rr', 'random', 'rmu')),
               (f'retain_divisor={c["retain_divisor"]}', 'real or published', c['retain_divisor'] in ('real', 'published')),
               (f'cb_lengths={c["cb_lengths"]}', 'two numbers, at least 0', len(c['cb_lengths']) == 2 and min(c['cb_lengths']) >= 0),
               ('merge_only=True without init_from, or with merge_adapter=False', 'an adapter to merge',
                not c['merge_only'] or c['init_from'] and c['merge_adapter']),
               (f'lora_dropout={c["lora_dropout"]}', 'at least 0 and below 1', 0 <= c['lora_dropout'] < 1),
               ('use_dynamic_scheduling=False with schedule_steps', 'one or the other', c['use_dynamic_scheduling'] or not c['schedule_steps']),
               (f'gradient_checkpointing={c["gradient_checkpointing"]}', 'auto, True or False', c['gradient_checkpointing'] in ('auto', 'True', 'False')),
               (f'dtype={c["dtype"]}', 'auto, float32, bfloat16 or float16', c['dtype'] in ('auto', 'float32', 'bfloat16', 'float16')),
               (f'device={c["device"]}', 'auto, cpu, cuda, cuda:N or mps', re.fullmatch(r'auto|cpu|cuda(:\d+)?|mps', c['device'])),
               (f'device={c["device"]} without such a device here', 'another', not (
                   c['device'].startswith('cuda') and int('0' + re.sub(r'\D', '', c['device'])) >= torch.cuda.device_count()
                   or c['device'] == 'mps' and not torch.backends.mps.is_available())),
               (f'{ranks} ranks and {rows_a_step} rows of each set a step', 'a row for each rank', ranks <= rows_a_step or c['merge_only']),
               (f'device={c["device"]} and {ranks} ranks', 'auto, cpu or cuda', ranks == 1 or c['device'] in ('auto', 'cpu', 'cuda')),
               (f'{ranks} ranks and {gpus} GPUs', 'a GPU for each rank of a machine',
                c['device'] == 'cpu' or not gpus or int(os.environ.get('LOCAL_WORLD_SIZE', 1)) <= gpus)]
    checks += [(f'an empty {name}', 'at least one', c[name]) for name in ('target_layers', 'target_modules', 'layers_to_transform', 'output_dir')]
    checks += [(f'{name}={c[name]}, with one twice', 'each once', len(set(c[name])) == len(c[name])) for name in
               ('target_layers', 'target_modules', 'layers_to_transform')]
    for found, wanted, good in checks:
        if not good:
            fail(f'{found} found, {wanted} wanted')
    blocks = c['num_hidden_layers'] or max(c['target_layers']) + 1
    if min(c['target_layers']) < 1 or max(c['target_layers']) > blocks:
        fail(f'target_layers={c["target_layers"]} found, numbers in 1..{blocks} wanted (num_hidden_layers keeps {blocks} blocks)')
    if min(c['layers_to_transform']) < 0 or max(c['layers_to_transform']) >= blocks:
        fail(f'layers_to_transform={c["layers_to_transform"]} found, numbers in 0..{blocks - 1} wanted (num_hidden_layers keeps {blocks} blocks)')
    for folder, replace in ((c['output_dir'], c['overwrite']), (c['output_dir'] + '.partial', c['overwrite'] or c['resume'])):
        ours = any(os.path.exists(os.path.join(folder, name)) for name in ('cb_config.json', 'log.jsonl', CHECKPOINT))
        if os.path.lexists(folder) and (not os.path.isdir(folder) or os.listdir(folder)) and not (replace and ours):
            go_on = ', or --resume=True to go on' if os.path.exists(os.path.join(folder, CHECKPOINT)) else ''
            fail(f'output_dir: {folder} is there already; choose another' + (f', or add --overwrite=True to replace it{go_on}' if ours else ''))


def check_writable(output_dir, model_dir):
    """Ends with one line if output_dir cannot be made, lies inside the model, or another run is writing it."""
    if os.path.commonpath([os.path.realpath(model_dir), output_dir]) == os.path.realpath(model_dir):
        fail(f'output_dir: {output_dir} lies in the model that is to be copied, {model_dir}; choose another')
    old = output_dir + '.old'  # a run that was killed while it replaced its output leaves it
    if os.path.lexists(old) and not os.path.exists(os.path.join(old, 'cb_config.json')):
        fail(f'output_dir: {old}, the name for what is replaced, is there already and no run wrote it; move it or choose another')
    folder = os.path.dirname(os.path.abspath(output_dir))
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        fail(f'output_dir: {folder} is no folder that can be written; choose another')
    log_path = os.path.join(output_dir + '.partial', 'log.jsonl')
    if os.path.isfile(log_path):
        open_log(log_path).close()


def check_model(model_dir, c):
    """Ends with one line if the checkpoint cannot be trained with the options. Returns {linear that gets a LoRA: (out, in)}."""
    try:
        config = AutoConfig.from_pretrained(model_dir)
    except Exception as e:
        fail(f'{model_dir}: no config.json of a model that transformers knows ({type(e).__name__})')
    if getattr(config, 'quantization_config', None):
        fail(f'{model_dir}: the checkpoint is quantised; the merge needs the original weights')
    if hasattr(config, 'text_config'):
        fail(f'{model_dir}: {config.model_type} is multimodal; a text-only decoder is wanted')
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, 'is_encoder_decoder', False):
        fail(f'{model_dir}: {config.model_type} is no causal language model; a decoder is wanted')
    wanted = c['num_hidden_layers'] or max(c['target_layers']) + 1
    if wanted > config.num_hidden_layers:
        fail(f'num_hidden_layers={wanted} found, but {model_dir} has {config.num_hidden_layers} blocks')
    try:
        with torch.device('meta'):  # the model's shape without its weights
            model = AutoModel.from_config(truncated_config(model_dir, wanted)[0])
    except Exception as e:
        fail(f'{model_dir}: not a model that transformers can build ({type(e).__name__})')
    if not isinstance(getattr(model, 'layers', None), nn.ModuleList) or not hasattr(model, 'norm'):
        fail(f'{model_dir}: {type(model).__name__} keeps its blocks in another way; a decoder with .layers and a final .norm, like Llama, is wanted')
    stored = {name: tensor for shard in shards(model_dir) for name, tensor in read_header(os.path.join(model_dir, shard))[0].items()}
    shapes = {}
    for i in c['layers_to_transform']:
        linears = {name.rpartition('.')[2]: name for name, module in model.layers[i].named_modules() if isinstance(module, nn.Linear)}
        for module in c['target_modules']:
            if module not in linears:
                fail(f'target_modules: block {i} has no linear layer {module!r}, but {", ".join(linears)}')
            name = f'layers.{i}.{linears[module]}'
            tensor, linear = stored[stored_name(stored, name)], model.get_submodule(name)
            if tensor['dtype'] not in TORCH_DTYPES or tensor['shape'] != [linear.out_features, linear.in_features]:
                fail(f'{model_dir}: {name} is stored as {tensor["dtype"]} {tensor["shape"]}; {[linear.out_features, linear.in_features]} in one of '
                     f'{", ".join(TORCH_DTYPES)} wanted')
            shapes[name] = linear.out_features, linear.in_features
    return shapes


def versions():
    """What the run stands on, for the log and cb_config.json."""
    return {'python': platform.python_version(), **{name: importlib.metadata.version(name) for name in ('torch', 'transformers', 'safetensors', 'datasets')}}


if __name__ == '__main__':
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))  # as torchrun sets them
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, 'w')  # rank 0 speaks and writes for all
    config = configure(__file__, sys.argv[1:])
    globals().update(config)  # from here on every option is a plain name, as in the block above
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if 'RANK' in os.environ:
        dist.init_process_group()  # gloo for tensors on the CPU, nccl for those on a GPU
    sys.excepthook = fault
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_now)
    output_dir = os.path.realpath(output_dir)  # a link stays, and what it points to is written
    partial, done_already = output_dir + '.partial', os.path.exists(os.path.join(output_dir, 'cb_config.json'))
    if resume and done_already and not os.path.exists(partial) and not (overwrite and not os.path.exists(os.path.join(output_dir, CHECKPOINT))):
        differ = differing(config, json.load(open(os.path.join(output_dir, 'cb_config.json'), encoding='utf-8')))
        if differ:
            another_run(output_dir, differ)
        summed(torch.zeros(1))  # every rank has looked
        if rank == 0:
            finish(output_dir)
        print(f'{output_dir}: complete already, nothing to resume')
        sys.exit(0)

    # everything that the user may have got wrong, before the model is loaded or anything written
    check_options({**config, 'output_dir': output_dir}, world)
    if fsdp and not dist.is_initialized():
        fail('fsdp=True without ranks found, torchrun --nproc_per_node=N cb_train.py ... wanted')
    if rank == 0:
        check_writable(output_dir, model_name)
    retain_messages = cb_messages = val_rows = []
    if not merge_only:
        as_benign, as_harmful = (functools.partial(messages_of, answers=answers) for answers in (BENIGN_ANSWERS, HARMFUL_ANSWERS))
        retain_messages = load_rows(retain_data_path, as_benign, 'train_sft', limit=num_retain_examples, seed=seed, option='retain_data_path')
        cb_messages = load_rows(cb_data_path, as_harmful, limit=num_cb_examples, seed=seed, option='cb_data_path')
        val_rows = numbered_rows(val_data_path, labelled) if val_data_path else []
    model_dir = find_checkpoint(model_name)
    shapes = check_model(model_dir, config)
    adapter = read_adapter(init_from, shapes, lora_r, lora_alpha) if init_from else {}
    soft_prompts = read_soft_prompts(soft_prompts_path, AutoConfig.from_pretrained(model_dir).hidden_size) if soft_prompts_path else []
    tokenizer = load_tokenizer(model_dir, chat_template)
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() and world == 1 else 'cpu'
    if device == 'cuda' and world > 1:
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
        torch.cuda.set_device(device)

    counted = {'retain': 'response' if loss_on == 'response' else 'all', 'harmful': 'all' if loss_on == 'all' else 'response'}
    sets, val_sets = {}, {}
    if not merge_only:
        sets = {'retain': encode_all(tokenizer, retain_messages, 'retain_data_path', max_seq_length, counted['retain']),
                'harmful': encode_all(tokenizer, cb_messages, 'cb_data_path', max_seq_length, counted['harmful'], cb_lengths)}
    if val_rows:
        val_sets = {label: encode_all(tokenizer, [(where, m) for where, (l, m) in val_rows if l == label], f'val_data_path: {label}', max_seq_length,
                                      counted[name]) for label, name in (('benign', 'retain'), ('harmful', 'harmful'))}

    # what a checkpoint must agree with, and the checkpoint if there is one
    state = {'options': {**{name: value for name, value in config.items() if name not in MAY_DIFFER}, 'ranks': world}, 'base': base_files(model_dir),
             'rows': rows_digest(sets.values()) + (hashlib.sha256(soft_prompts.numpy().tobytes()).hexdigest() if soft_prompts_path else ''),
             'step': 0, 'tokens': 0, 'seconds': 0.0, 'log_bytes': 0, 'record': {}}
    checkpoint_path, log_path, tensors = os.path.join(partial, CHECKPOINT), os.path.join(partial, 'log.jsonl'), None
    if resume and os.path.exists(checkpoint_path):
        state, tensors = read_checkpoint(checkpoint_path, state)

    # the model: truncated, frozen, with a LoRA beside each of its target linears
    torch.manual_seed(seed)
    model = load_decoder(model_dir, num_hidden_layers or max(target_layers) + 1, dtype, device, mapped=fsdp)
    named_loras = add_lora(model, target_modules, layers_to_transform, lora_r, lora_alpha, lora_dropout)
    for lora in named_loras.values() if lora_b_std else ():
        lora.lora_B.data.copy_(torch.randn(lora.lora_B.shape) * lora_b_std)
    for name, (a, b) in adapter.items():
        named_loras[name].lora_A.data.copy_(a)
        named_loras[name].lora_B.data.copy_(b)
    if fsdp:
        shard(model, device)
    if rank:
        torch.manual_seed(random.Random(f'{seed} rank {rank}').getrandbits(63))  # each rank drops its own elements
    loras = list(named_loras.values())
    parameters = [p for lora in loras for p in (lora.lora_A, lora.lora_B)]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    run_cb = cb_pass
    if cb_loss != 'rr':
        u = F.normalize(torch.rand(model.config.hidden_size, generator=torch.Generator().manual_seed(seed)), dim=0).to(device)
        run_cb = functools.partial(cb_pass, token_loss=towards(cb_loss, u, rmu_norm))
    ticks = (schedule_steps or max_steps) if use_dynamic_scheduling else 0
    rows_a_step = batch_size * gradient_accumulation_steps

    # what a pass may hold, decided on rows of random tokens: two as long as the longest row, two short ones
    longest = max((len(row.ids) for rows in sets.values() for row in rows), default=32) + (len(soft_prompts[0]) if soft_prompts_path else 0)
    long_probe, probe = (torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0)).to(device)
                         for length in (longest, 32))
    with adapter_off(model):
        pass_rows = batch_size if can_pack(model, long_probe) else 1
    if not merge_only:
        pass_tokens, checkpointing, why = plan(model, probe[:pass_rows], longest, pass_rows, micro_batch_tokens, gradient_checkpointing)

    # the output directory is ours from here on, as soon as every rank has seen it: emptied, or cut back to the checkpoint
    summed(torch.zeros(1))
    log = sys.stdout
    if rank == 0:
        os.makedirs(partial, exist_ok=True)
        log = open_log(log_path)
        kept = ('log.jsonl', CHECKPOINT) if tensors else ('log.jsonl',)
        for path in (os.path.join(partial, name) for name in os.listdir(partial) if name not in kept):
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
        log.truncate(state['log_bytes'])
    if tensors:
        restore(tensors, named_loras, optimizer, rank)
    else:
        save_checkpoint(checkpoint_path, named_loras, optimizer, state, rank, world)
    print(' | '.join(f'{name} {version}' for name, version in versions().items())
          + f' | {world} x {device}, {model.dtype}, {model.config._attn_implementation}')
    print('\n'.join(f'{name} = {value!r}' for name, value in config.items()))
    print(f'{len(model.layers)} blocks, {len(loras)} LoRAs, {sum(p.numel() for p in parameters):,} trainable of {sum(p.numel() for p in model.parameters()):,} parameters')
    for name, rows in sets.items():
        mean = count(rows) / len(rows)
        print(f'{name}: {len(rows)} rows, {mean:.0f} tokens that count on average, {sum(len(r.ids) == max_seq_length for r in rows)} at the limit of '
              f'{max_seq_length}; {rows_a_step} rows, about {rows_a_step * mean:.0f} tokens a step, {max_steps * rows_a_step / len(rows):.1f} epochs')
    if not merge_only:
        print(f'passes of at most {pass_rows} {"rows" if pass_rows > 1 else "row"} and {pass_tokens} tokens; '
              f'gradient checkpointing {"on" if checkpointing else "off"}: {why}')
    if not (val_rows or merge_only):
        print('no val_data_path: no validation pass')
    if resume:
        print(f'resumed at step {state["step"]}' if tensors else 'no checkpoint to resume from: starting at step 0')

    # from here to the end of the loop, SIGINT and SIGTERM let a step finish
    stopped, record, start = [], state['record'], time.time() - state['seconds']
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stopped.append(number))
    steps = 0 if merge_only else max_steps

    # a step's gradients, the sums of its losses and cosines, and the signals that came are one buffer: one sum over the ranks a step
    sizes = [p.numel() for p in parameters]
    flat = torch.zeros(sum(sizes) + 6, device=device)
    for p, piece in zip(parameters, flat.split([*sizes, 6])):
        p.grad = piece.view_as(p)
    sources = ('retain', retain_pass, sets.get('retain')), ('cb', run_cb, sets.get('harmful'))
    for step in tqdm(range(state['step'], steps), desc='train', disable=None, initial=state['step'], total=steps):
        record = {'step': step, 'loss': 0.0}

        # the rows of the step on the device; both losses are sums over tokens divided by a number known beforehand, so that no
        # split into passes changes more than the memory and the time
        work = []
        for (name, run, rows), coeff in zip(sources, coefficients(step, lorra_alpha, ticks)):
            batch, soft, lot = batch_at(rows, step, rows_a_step, f'{seed} {name}'), None, random.Random(f'{seed} {name} {step}')
            if soft_prompts_path and lot.random() < 0.5:
                soft = lot.choice(soft_prompts).to(device)  # (S, D)
                batch = [opened(row, len(soft), lot) for row in batch]
            divisor = tokens = count(batch)
            if name == 'retain' and retain_divisor == 'published':  # every position, pads too, and the embedding as one more state
                divisor = rows_a_step * max_seq_length * (len(model.layers) + 1) / len(model.layers)
            batches = list(passes(model, batch, pass_rows, pass_tokens, device, rank, world, soft))
            work.append(Work(name, run, batch, soft, batches, coeff, divisor, tokens))

        # forward and backward; nothing waits for the device before the one read at the end
        sums = [add_gradient(w.run, model, w.batches, target_layers, w.coeff / w.divisor, checkpointing) for w in work]
        flat[-6:-2] = torch.stack([*sums[0], *sums[1]])
        flat[-2:] = torch.tensor([float(number in stopped) for number in (signal.SIGINT, signal.SIGTERM)])
        summed(flat)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        *sums, interrupted, terminated, record['grad_norm'] = torch.cat([flat[-6:], grad_norm.view(1)]).tolist()
        for w, loss_sum, cos_sum in zip(work, sums[::2], sums[1::2]):
            record |= {f'{w.name}_loss': loss_sum / w.divisor, f'{w.name}_coeff': w.coeff, f'{w.name}_cos': cos_sum / w.tokens}
            record['loss'] += w.coeff * record[f'{w.name}_loss']
            state['tokens'] += w.tokens
        if not math.isfinite(record['loss'] + record['grad_norm']):
            with torch.no_grad():
                bad = [row.where for w in work for row in w.rows
                       if not math.isfinite(w.run(model, *next(passes(model, [row], 1, 1, device, soft=w.soft)), target_layers)[0])]
            last_word(f'fault: step {step}: retain_loss {record["retain_loss"]}, cb_loss {record["cb_loss"]}, grad_norm {record["grad_norm"]}: '
                      f'stopped before the optimizer step; {"rows: " + ", ".join(bad) if bad else "no single row alone does it"}; the checkpoint of step '
                      f'{state["step"]} is kept; lower learning_rate or lorra_alpha, or use dtype=bfloat16 instead of float16')
            sys.exit(1)
        neutral = step == 0 and not init_from and not lora_b_std and cb_loss == 'rr'  # B is zero: h' = h
        if neutral and (record['retain_loss'] > 1e-3 or abs(record['cb_loss'] - 1) > 1e-3):
            sys.exit(f'step 0: retain_loss {record["retain_loss"]} and cb_loss {record["cb_loss"]} found, 0 and 1 wanted: the adapter is not neutral')
        optimizer.step()
        flat.zero_()

        last, validated = step == steps - 1, step % eval_interval == 0
        if step % log_interval == 0 or validated or last:
            record |= {'learning_rate': learning_rate, 'seconds': round(time.time() - start, 3), 'tokens': state['tokens']}
            line = ('step {step:4d} | loss {loss:8.4f} | retain {retain_loss:7.4f} x {retain_coeff:5.2f} cos {retain_cos:6.3f} | '
                    'cb {cb_loss:6.4f} x {cb_coeff:5.2f} cos {cb_cos:6.3f} | grad {grad_norm:8.2e} | {seconds:6.1f} s').format(**record)
            if val_rows and (validated or last):
                record |= validate(model, val_sets, loras, target_layers, pass_rows, pass_tokens, device, rank, world, run_cb)
                line += ' | val retain {val_retain_loss:.4f} cos {val_retain_cos:.3f} cb {val_cb_loss:.4f} cos {val_cb_cos:.3f}'.format(**record)
            tqdm.write(line)
            print(json.dumps(record), file=log, flush=True)
        came = signal.SIGINT if interrupted else signal.SIGTERM if terminated else 0  # to any rank: all stop after the same step
        if world == 1 or last:
            came = stopped[0] if stopped else 0
        if last or came or (step + 1) % save_interval == 0:
            state |= {'step': step + 1, 'seconds': time.time() - start, 'log_bytes': os.fstat(log.fileno()).st_size, 'record': record}
            save_checkpoint(checkpoint_path, named_loras, optimizer, state, rank, world)
        if came:
            print(f'{signal.Signals(came).name}: step {step} done and saved; go on with the same command and --resume=True', file=sys.stderr)
            sys.exit(128 + came)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_now)

    # save: adapter, model card, options, merged model; then reload it and compare its states with the adapted ones
    for lora in loras:
        lora.eval()
    if merge_adapter:  # sharded blocks compute with every rank, so before all but rank 0 leave
        adapted = states(model, probe)
        fold(loras)
        folded = states(model, probe)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank:
        sys.exit()
    save_adapter(os.path.join(partial, 'adapter'), named_loras, model_name, lora_r, lora_alpha, lora_dropout)
    write_json(os.path.join(partial, 'cb_config.json'), {**config, 'ranks': world, 'versions': versions()})
    with open(os.path.join(partial, 'README.md'), 'w', encoding='utf-8') as f:
        f.write(model_card(config, {name: len(rows) for name, rows in sets.items()}, record))
    message = f'{output_dir}: the adapter, in PEFT\'s format, in {os.path.join(output_dir, "adapter")}'
    if merge_adapter:
        now = base_files(model_dir)
        changed = [name for name, was in state['base'].items() if now.get(name) != was]
        if changed:
            sys.exit(f'fault: {os.path.join(model_dir, changed[0])} has changed since the training began: merging would mix two models; put it '
                     'back and go on with --resume=True, or start anew')
        need, free = sum(size for size, _ in state['base'].values()), shutil.disk_usage(partial).free
        if need > free:
            sys.exit(f'fault: the merged model needs {need:,} bytes, {free:,} are free at {partial}: make room and go on with --resume=True')
        merge(model_dir, partial, {name: lora.delta for name, lora in named_loras.items()})
        if chat_template:
            shutil.copyfile(chat_template, os.path.join(partial, 'chat_template.jinja'))
        blocks, exact = len(model.layers), dtype == 'auto' and model.dtype == torch.float32
        del model, loras, named_loras, parameters, optimizer
        merged = load_decoder(partial, blocks, dtype, device, mapped=fsdp)
        merged = states(visit(merged, device) if fsdp else merged, probe)
        # the file's arithmetic against memory's, and against the adapter beside the weight, which half precision rounds otherwise
        off, rounded = farthest(folded, merged), farthest(adapted, merged)
        if not (off <= (1e-4 if exact else 2e-2) and rounded <= (1e-3 if exact else 0.2)):
            sys.exit(f'{partial}: the merged model, reloaded, is {off:.1e} away from what was to be written and {rounded:.1e} from the adapted '
                     f'model; it was not moved to {output_dir}')
        message = f'{output_dir}: merged and reloaded; its states are {off:.1e} away from what was to be written, {rounded:.1e} from the adapted model\'s'
    if os.path.exists(output_dir):
        shutil.rmtree(output_dir + '.old', ignore_errors=True)
        os.rename(output_dir, output_dir + '.old')
    os.rename(partial, output_dir)
    finish(output_dir)
    print(message)
