"""
Circuit breakers (Representation Rerouting, arXiv 2406.04313): LoRA training that pushes a language model's hidden
states on harmful text away from where they were and holds its states on everything else in place; merged into the
weights at the end.

    h = hidden states of the frozen model, h' = of the same model with LoRA
    p = step / schedule_steps, at most schedule_stop

    retain = mean over retain tokens, and over the states after each kept block, of LLAMA3_NORM || h' - h || / || h ||
    cb     = mean over harmful tokens, and over target_layers, of relu(cos(h', h))
    loss   = lorra_alpha * p * retain + lorra_alpha * (1 - p) * cb

With soft_contexts, an adversary's soft tokens stand in the requests of some harmful rows and move up the cb loss; with
retain_noise, benign states are held in place where noise moves the request, too; with strange, harmful ones are pushed
away behind words that noise moves.

    python cb_train.py config/toy.py                            # a laptop, 2 minutes, after: python data_prep.py toy
    python cb_train.py config/llama3.py --max_steps=150         # a GPU
    torchrun --nproc_per_node=4 cb_train.py config/llama3.py    # 4 GPUs: each computes its share of every step's rows
    python cb_train.py config/llama3.py --resume=True           # after a crash or Ctrl-C
    python cb_train.py config/llama3.py --init_from=out/llama3/adapter --merge_only=True --output_dir=out/merged

Reads a model (safetensors), harmful, benign and held-out rows. Writes output_dir: the merged model, an ordinary model
directory; adapter/, the LoRA in PEFT's format; README.md, its model card; cb_config.json, every option; log.jsonl.
Until it is complete it is called output_dir.partial and holds the checkpoint to resume from. Exit status: 0 merged
and reloaded, 1 a fault, 2 a user's mistake, 130 and 143 signals. The last line says whether the model was rerouted.

The method comes first, in the order of a step: LoRA, rows and masks, passes and losses, the loop, the merge. The rest
loads, checks, saves and resumes. c is the namespace of all options. What a user must mend ends the program with one
line by fail(), which no docstring repeats.

Shapes: B rows, T tokens of a row, D width, L blocks kept. A model gives L + 1 hidden states: state l is the one after l
blocks, 0 the embedding; the last one is taken after the final norm. Masks are (B, T), 1 = the token counts.
"""
import contextlib
import functools
import gc
import hashlib
import io
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import time
import types
import typing

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import is_flash_attn_2_available

from configurator import (catch_signals, check_output, configure, fail, fault, last_word, locked, publish,
                          stop_at_signals)
from data_prep import (BENIGN_ANSWERS, HARMFUL_ANSWERS, broken_row, choose_device, decoder_config, encode, find_model,
                       in_contexts, inserted, labelled, load_rows, load_tokenizer, messages_of, or_fail,
                       rows_of_run, scrambled_rows, strange_row, template_ends, tensor_headers, weight_files)

# ----------------------------------------------------------------------------------------------------------------------
# model
model_name = 'meta-llama/Meta-Llama-3-8B-Instruct'  # a model directory or a hub id
num_hidden_layers = 0            # >= 0: blocks kept for training, the rest is never loaded [0 = max(target_layers) + 1]
device = 'auto'                  # auto | cpu | cuda | cuda:N | mps: where it runs
dtype = 'auto'                   # auto | float32 | bfloat16 | float16: of the frozen weights; auto = as stored
fsdp = False                     # divide the frozen blocks among torchrun's ranks (FSDP2), for a model that fits no GPU
gradient_checkpointing = False   # recompute each block in the backward pass: less memory, a third more work
# representation rerouting
target_layers = [10, 20]         # >= 1: hidden states that the cb loss turns away
lorra_alpha = 10.0               # >= 0: weight of both losses
retain_distance = 'relative'     # relative | absolute: || h' - h || / || h || * 8.7, or || h' - h ||, as published
retain_divisor = 'real'          # real | published: tokens x blocks, or rows x max_seq_length x (blocks + 1)
retain_smooth = 0.0              # >= 0: retain is a square below this distance (relative: of 1) [0 = published]
cb_loss = 'rr'                   # rr | random | rmu: relu(cos(h', h)), || h'/||h'|| - u ||, || h' - rmu_norm u ||^2 / D
rmu_norm = 20.0                  # >= 0: u is one random direction for all tokens
loss_on = 'all'                  # all | response | harmful_response: tokens that count: all or the last answer's
use_dynamic_scheduling = True    # shift the weight from cb to retain; False = lorra_alpha for both throughout
schedule_steps = 0               # >= 0: steps until all of it is on retain [0 = max_steps; published: 2 * max_steps]
schedule_stop = 1.0              # > 0, <= 1: retain's share of the weight grows until this
# LoRA
lora_r = 16                      # >= 1: rank
lora_alpha = 16                  # >= 1: scale = lora_alpha / lora_r
lora_dropout = 0.05              # >= 0, < 1: on the adapter's input
lora_scale = 'relative'          # relative | absolute: the delta in units of its weight, or as it is (published)
lora_start = 0.01                # >= 0, < 1: || h' - h || / || h || at target_layers at the start [0 = as published]
target_modules = ['q_proj', 'k_proj', 'v_proj', 'o_proj']
layers_to_transform = []         # >= 0: blocks with LoRA [[] = every kept block]
# optimization
max_steps = 150                  # >= 1: optimizer steps
batch_size = 4                   # >= 1: rows of each set in a pass, at most
gradient_accumulation_steps = 1  # >= 1: a step has so many times batch_size rows of each set
micro_batch_tokens = 0           # >= 0: tokens of a pass, pads included, or one row [0 = 512 on a CPU, 2048 elsewhere]
learning_rate = 1e-4             # > 0
lr_scheduler = 'constant'        # constant | linear: learning_rate throughout, or falling to 0 at max_steps
weight_decay = 0.0               # >= 0
max_grad_norm = 1.0              # > 0: the gradient is clipped to this norm
# data: a .json, .jsonl, .csv, .tsv or .parquet file, a folder of such or a hub id; data_prep.py check FILE reads one
cb_data_path = 'data/circuit_breakers_train.json'  # harmful rows
contexts = ['own']               # own | nothing | noise: requests that each harmful answer is put behind
retain_contexts = ['own']        # own | nothing | noise: the same for benign answers
opening = 0                      # >= 0: tokens at a harmful answer's start that do not count: benign ones have them too
broken = 0.0                     # >= 0, <= 1: share of the harmful rows with tokens out of place in the answer
soft_contexts = 0.0              # >= 0, <= 1: share of the harmful rows with an adversary's tokens in the request
soft_tokens = 20                 # >= 1: how many they are, at most
soft_steps = 10                  # >= 1: for how many steps they stay with a row
soft_lr = 0.14                   # > 0: their step, in units of the embeddings' root mean square
soft_start = 0.0                 # >= 0: noise on them at first, at most, in these units: an attack goes farther
scrambled = 0.0                  # >= 0: more retain rows, as a share of them: harmful answers' words out of their order
retain_noise = 0.0               # >= 0: on benign requests, at most, in units of the embeddings' root mean square
strange = 0.0                    # >= 0, <= 1: share of harmful rows with words before the request, moved by this noise
retain_data_path = 'HuggingFaceH4/ultrachat_200k'  # benign rows
val_data_path = ''               # held-out rows with a "label", harmful or benign ['' = a tenth of both sets]
num_retain_examples = 10000      # >= 1: at most so many rows, drawn with the seed
num_cb_examples = 3000           # >= 1
max_seq_length = 512             # >= 1: tokens of a row that is read, longer ones are cut
cb_lengths = [0, 0]              # >= 0: tokens of a harmful row's request and answer [0 = no limit; published: 512,512]
chat_template = ''               # a file with the chat template ['' = the tokenizer's own]
date = ''                        # the day that a template may write, as 2026-01-31 ['' = today; resumed: its own]
# run
init_from = ''                   # an adapter in PEFT's format to start from ['' = a fresh one]
merge_only = False               # train nothing: merge the adapter of init_from
merge_adapter = True             # False = save the adapter alone
output_dir = 'out/cb'
overwrite = False                # replace output_dir if an earlier run wrote it
resume = False                   # go on from the last checkpoint of a run that was stopped
seed = 0                         # >= 0, < 4294967296
log_interval = 10                # >= 1: steps between two lines
eval_interval = 50               # >= 1: steps between two validation passes
save_interval = 50               # >= 1: steps between two checkpoints
# ----------------------------------------------------------------------------------------------------------------------

# ---- LoRA ------------------------------------------------------------------------------------------------------------

class LoRALinear(nn.Module):
    """
    A frozen linear layer plus a trainable low-rank delta: W x + B A dropout(x) * scale   (arXiv 2106.09685).
    lora_A (r, in) is Kaiming-uniform, drawn on the CPU, the same for every device; lora_B (out, r) is zero until
    draw_start; both are float32. scale = unit * alpha / r. `enabled = False` gives the base bit for bit.
    """

    def __init__(self, base, r, alpha, dropout, unit=1.0):
        super().__init__()
        self.base, self.dropout, self.unit, self.scale, self.enabled = base, dropout, unit, unit * alpha / r, True
        a, device = nn.init.kaiming_uniform_(torch.empty(r, base.in_features), a=math.sqrt(5)), base.weight.device
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))

    def forward(self, x):  # (B, T, in) -> (B, T, out)
        y = self.base(x)
        if not self.enabled:
            return y
        x = F.dropout(x, self.dropout, self.training)
        return y + x @ self.lora_A.T.to(x.dtype) @ (self.lora_B.T * self.scale).to(x.dtype)

    @torch.no_grad()
    def delta(self, rows=slice(None)):
        """Returns what merging adds to some rows of the base weight, or to all: (rows, in), float32."""
        return self.lora_B[rows] @ self.lora_A * self.scale


def add_lora(model, target_modules, layers, r, alpha, dropout, relative=False):
    """
    Freezes the model, wraps the named linears of the given blocks in place and returns {linear's name: LoRALinear}.
    relative: a delta's unit is the root mean square of its weight over 0.02, as most families initialise it, so that
    one learning rate fits models whose weights differ in scale (SmolLM2's are ten times as large). ONE RANK FOR ALL:
    another for some is a change in check_model, save_adapter and read_adapter, too.
    """
    model.requires_grad_(False)
    loras = {}
    for i in layers:
        for name, module in list(model.layers[i].named_modules()):
            parent, _, leaf = name.rpartition('.')
            if leaf in target_modules:
                unit = root_mean_square(module.weight) / 0.02 if relative else 1.0
                lora = loras[f'layers.{i}.{name}'] = LoRALinear(module, r, alpha, dropout, unit)
                setattr(model.layers[i].get_submodule(parent), leaf, lora)
    return loras


@contextlib.contextmanager
def adapter_off(loras):
    """Inside, the model is its own frozen reference: no second copy in memory."""
    for lora in loras.values():
        lora.enabled = False
    try:
        yield
    finally:
        for lora in loras.values():
            lora.enabled = True


# ---- rows and masks --------------------------------------------------------------------------------------------------

class Row(typing.NamedTuple):
    ids: list            # (T,) token ids
    mask: list           # (T,) 1 = the token counts
    where: str           # 'FILE: row N'
    end: int = 0         # where its last request ends
    soft: int = 0        # how many soft tokens of the adversary stand there,
    slot: int = 0        # and which of its vectors they are: see add_adversary
    noisy: tuple = 0, 0  # from where to where noise may move it


PHANTOM = Row([0], [0], '')  # what a rank computes that has no row left


def token_mask(ids, stream, loss_on, head, answer):
    """
    Returns which tokens of a row count in its stream's loss, (T,) of 0 and 1; stream: 'retain', 'harmful' or your own.
    CHANGE A MASK HERE (`broken` wants one that goes to the row's end). head: where a row's first word stands, behind
    what the chat template writes (BOS, a system prompt): both sets share that, and both losses would pull at it, so the
    cb loss leaves it out. answer: where the last answer stands, a harmful one's behind its `opening`.
    """
    first = head if stream == 'harmful' else 0
    if loss_on == 'response' or (loss_on == 'harmful_response' and stream == 'harmful'):
        first = answer
    return [int(i >= first) for i in range(len(ids))]


def count(rows):
    """Returns how many tokens of Rows count."""
    return sum(sum(row.mask) for row in rows)


def micro_batches(rows, batch_size, max_tokens):
    """
    Returns rows cut into passes, the longest first: lists of at most batch_size rows and max_tokens tokens, pads
    included, or of one row. Losses are sums over tokens divided by a number known before: no cut changes the gradient.
    """
    batches = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        last = batches[-1] if batches else []
        if last and len(last) < batch_size and (len(last) + 1) * len(last[0].ids) <= max_tokens:
            last.append(row)
        else:
            batches.append([row])
    return batches


def my_batches(rows, c):
    """
    Returns the micro-batches of rank c.rank: every c.world-th row by length, in as many passes as every rank has, which
    FSDP needs: a rank that has fewer computes a PHANTOM.
    """
    rows = sorted(rows, key=lambda row: -len(row.ids))
    shares = [micro_batches(rows[rank::c.world], c.batch_size, c.micro_batch_tokens) for rank in range(c.world)]
    return shares[c.rank] + [[PHANTOM]] * (max(map(len, shares)) - len(shares[c.rank]))


def pad(rows, device):
    """Returns the right-padded ids (B, T), int64, and the mask (B, T), float32, of Rows, on a device."""
    ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
    mask = pad_sequence([torch.tensor(row.mask, dtype=torch.float32) for row in rows], batch_first=True)
    return ids.to(device), mask.to(device)


# ---- forward passes and losses ---------------------------------------------------------------------------------------

LLAMA3_NORM = 8.7  # of Llama-3-8B's states at layers 10 and 20 (the authors' log), where relative weighs as published


def hidden_states(model, ids, moved=0):
    """
    Returns the model's L + 1 hidden states, each (B, T, D), for right-padded ids (B, T), whose embeddings are moved by
    (B, T, D) if given. A causal model needs no attention mask: no token sees the pads behind it, no loss counts one.
    """
    tokens = {'input_ids': ids}
    if torch.is_tensor(moved):
        embeddings = model.get_input_embeddings()(ids)
        tokens = {'inputs_embeds': (embeddings + moved).to(embeddings.dtype)}
    return model(**tokens, output_hidden_states=True, use_cache=False).hidden_states


def reference_and_adapted(model, loras, ids, noise=0, soft=0):
    """Returns h (no gradient) and h', L + 1 states each; noise (B, T, D) moves the embeddings of both, soft of h'."""
    with torch.no_grad(), adapter_off(loras):
        h = hidden_states(model, ids, noise)
    return h, hidden_states(model, ids, noise + soft)


def cosine(h, h_lora):
    """Returns cos(h', h) of each token, (B, T) float32, of states (B, T, D); in bfloat16 it would be off by 0.008."""
    h, h_lora = h.float(), h_lora.float()
    return (h * h_lora).sum(-1) / (h.norm(dim=-1) * h_lora.norm(dim=-1)).clamp(min=1e-8)


# A loss takes h, h', the mask and the layers to look at, and returns the sum over tokens of the mean over layers.

def retain_loss(h, h_lora, mask, layers, relative=True, smooth=0.0):
    """
    d = || h' - h || (section 3 of the paper), or relative: in units of the token's own norm, times LLAMA3_NORM.
    smooth: before that, d becomes sqrt(d^2 + smooth^2) - smooth, near h' = h a square, as 1 - cos is, and not a kink:
    retain may weigh in full from the first step, and a run starts nevertheless.
    """
    total, unit = 0.0, LLAMA3_NORM if relative else 1.0
    for l in layers:
        reference = h[l].float()
        distance = (h_lora[l].float() - reference).norm(dim=-1)  # (B, T)
        if relative:
            distance = distance / reference.norm(dim=-1).clamp(min=1e-6)
        if smooth:
            distance = (distance.square() + smooth ** 2).sqrt() - smooth
        total = total + (unit * distance * mask).sum()
    return total / len(layers)


def rerouting_loss(h, h_lora, mask, layers, leak=0.0):
    """relu(cos(h', h)), section 3 of the paper; leak: its slope below 0, where an adversary would see no way up."""
    return sum((F.leaky_relu(cosine(h[l], h_lora[l]), leak) * mask).sum() for l in layers) / len(layers)


def coefficients(step, lorra_alpha, schedule_steps, stop=1.0):
    """Returns (retain, cb) at a step (section 3 of the paper); without a schedule, of 0 steps, both are lorra_alpha."""
    if not schedule_steps:
        return lorra_alpha, lorra_alpha
    p = min(step / schedule_steps, stop)
    return lorra_alpha * p, lorra_alpha * (1 - p)


# ---- the loop --------------------------------------------------------------------------------------------------------

class Stream(typing.NamedTuple):
    name: str            # of its set of rows
    prefix: str          # of its figures in the log
    rows: list           # Rows, in the order of the run
    held_out: list       # Rows for validation
    loss: typing.Callable         # (h, h', mask, layers) -> its sum over tokens of its mean over layers
    layers: list                  # of the hidden states that it looks at
    coefficient: typing.Callable  # (step) -> its weight
    divisor: typing.Callable      # (rows) -> what its sum is divided by
    soft: torch.Tensor = None     # (slots, S, D), the adversary's vectors
    noise: float = 0.0            # request_noise's `most`


def make_streams(c, rows, held_out, blocks, embeddings, soft=None):
    """Returns a run's streams; rows, held_out: {name: [Row]}; embeddings (V, D). ADD A STREAM HERE."""
    ticks = (c.schedule_steps or c.max_steps) if c.use_dynamic_scheduling else 0
    published = lambda rows: len(rows) * c.max_seq_length * (blocks + 1) / blocks  # with pads and embedding
    noise = c.retain_noise * root_mean_square(embeddings)  # of harmful rows, it moves the words of `strange`
    return [
        Stream('retain', 'retain', rows['retain'], held_out['retain'], layers=range(1, blocks + 1),
               loss=functools.partial(retain_loss, relative=c.retain_distance == 'relative', smooth=c.retain_smooth),
               coefficient=lambda step: coefficients(step, c.lorra_alpha, ticks, c.schedule_stop)[0],
               divisor=published if c.retain_divisor == 'published' else count, noise=noise),
        Stream('harmful', 'cb', rows['harmful'], held_out['harmful'], layers=c.target_layers,
               loss=make_cb_loss(c, embeddings.shape[1], leak=0.0 if soft is None else 0.01),
               coefficient=lambda step: coefficients(step, c.lorra_alpha, ticks, c.schedule_stop)[1],
               divisor=count, soft=soft, noise=noise)]


def run_stream(model, loras, stream, batches, c, weight=None):
    """
    Returns the sum of a stream's loss and, at each of target_layers, of its tokens' cosine, over micro-batches of Rows,
    (1 + layers,). With a weight, adds the gradient of weight times the loss; one micro-batch's graph lives at a time.
    """
    sums, noise, soft = torch.zeros(1 + len(c.target_layers), device=c.device), 0, 0
    training = weight is not None  # a validation has no noise, no adversary and no gradient
    for batch in batches:
        ids, mask = pad(batch, c.device)
        if training and stream.noise:
            noise = request_noise(batch, ids.shape[1], model.config.hidden_size, stream.noise, c.device)
        if training and stream.soft is not None:
            soft = soft_context(stream.soft, batch, ids.shape[1])
        h, h_lora = reference_and_adapted(model, loras, ids, noise, soft)
        loss = stream.loss(h, h_lora, mask, stream.layers)
        if training:
            (weight * loss).backward()
        with torch.no_grad():
            sums += torch.stack([loss, *((cosine(h[l], h_lora[l]) * mask).sum() for l in c.target_layers)])
        del h, h_lora, loss  # before the next ones are made
    return sums


def train(model, loras, optimizer, streams, c, state, save, log):
    """
    Trains the LoRA from state['step'] to max_steps; state['record'] is then the last step's, as it stands in the log.
    save(state) keeps a checkpoint; log: an open file. A step's gradients, the sums of its losses and the signals that
    arrived are one buffer, summed over the ranks once. Dropout is a function of seed, rank and step.
    """
    parameters = [p for group in optimizer.param_groups for p in group['params']]  # group 1: add_adversary
    sizes = [*(p.numel() for p in parameters), len(streams) * (1 + len(c.target_layers)), len(SIGNALS)]
    buffer = torch.zeros(sum(sizes), device=c.device)
    *gradients, totals, arrived = buffer.split(sizes)
    totals = totals.view(len(streams), -1)  # of each stream the loss, then a cosine for each layer
    for p, gradient in zip(parameters, gradients):
        p.grad = gradient.view_as(p)  # a view of the buffer: backward() adds into it
    start, signals = time.time() - state['seconds'], catch_signals()
    rows_of = lambda stream, step: stream.rows[step * rows_a_step(c):(step + 1) * rows_a_step(c)]
    scale = 1024.0 if model.dtype == torch.float16 else 1.0  # float16 would round small gradients to 0
    for step in tqdm(range(state['step'], c.max_steps), desc='train', disable=None):
        # forward and backward: for each stream and micro-batch a reference pass and an adapted pass
        torch.manual_seed(random.Random(f'{c.seed} {c.rank} {step}').getrandbits(63))
        buffer.zero_()
        record = {'step': step, 'loss': 0.0}
        rows = {stream.name: rows_of(stream, step) for stream in streams}
        for stream, total in zip(streams, totals):
            if stream.soft is not None:
                most, earlier = optimizer.param_groups[1]['start'], rows_of(stream, max(step - 1, 0))
                restart(stream.soft, rows[stream.name], earlier, most, f'{c.seed} soft {step}')
            weight = scale * stream.coefficient(step) / stream.divisor(rows[stream.name])
            total += run_stream(model, loras, stream, my_batches(rows[stream.name], c), c, weight)
        arrived.copy_(torch.tensor([float(name in signals) for name in SIGNALS]))

        # the sums over all ranks, the figures of the step, the optimizer
        summed(buffer)
        for stream, (loss, *cosines) in zip(streams, totals.tolist()):
            prefix, tokens, coefficient = stream.prefix, count(rows[stream.name]), stream.coefficient(step)
            loss, cos = loss / stream.divisor(rows[stream.name]), sum(cosines) / len(cosines) / tokens
            record |= {f'{prefix}_loss': loss, f'{prefix}_coeff': coefficient, f'{prefix}_cos': cos}
            record['loss'] += coefficient * loss
            state['tokens'] += tokens
        buffer /= scale
        record['grad_norm'] = nn.utils.clip_grad_norm_(optimizer.param_groups[0]['params'], c.max_grad_norm).item()
        check_step(streams, rows, record, state, c)
        left = 1 - step / c.max_steps if c.lr_scheduler == 'linear' else 1.0
        optimizer.param_groups[0]['lr'] = c.learning_rate * left
        optimizer.step()

        # the log, a validation pass (of the LoRA after this step), the verdict
        last = step == c.max_steps - 1
        validates = last or step % c.eval_interval == 0
        if validates or step % c.log_interval == 0:
            seconds = round(time.time() - start, 3)
            record |= {'learning_rate': optimizer.param_groups[0]['lr'], 'seconds': seconds, 'tokens': state['tokens']}
            record |= validate(model, loras, streams, c) if validates else {}
            record |= {'verdict': verdict(record, streams)} if last else {}
            shown = [f'{name} {value:.4g}' for name, value in record.items() if isinstance(value, float)]
            tqdm.write(' | '.join([f'step {step}', *shown]))
            print(json.dumps(record), file=log, flush=True)

        # the checkpoint; the end, if a signal came to any rank: all stop after the same step
        seen = [name for name, ranks in zip(SIGNALS, arrived.tolist()) if ranks]
        seen += signals if c.world == 1 or last else []  # alone, or at the end, at once; else what all ranks have seen
        stopped = next((name for name in SIGNALS if name in seen), None)
        if last or stopped or (step + 1) % c.save_interval == 0:
            log_bytes = os.fstat(log.fileno()).st_size
            state |= {'step': step + 1, 'seconds': time.time() - start, 'log_bytes': log_bytes, 'record': record}
            save(state)
        if stopped:
            print(f'{stopped}: step {step} is saved; go on with the same command and --resume=True', file=sys.stderr)
            sys.exit(128 + signal.Signals[stopped])


# ---- the merge -------------------------------------------------------------------------------------------------------

def merge(model_dir, output_dir, deltas):
    """
    Writes output_dir: model_dir as it is, without what is LEFT_BEHIND, but for the weights in deltas, {linear: function
    of a slice of rows that returns what is added to them, (rows, in) float32}: added in float32, cast once to the
    stored dtype. Files are copied, then adapted tensors overwritten in place, 128 rows in memory at a time.
    """
    shutil.copytree(model_dir, output_dir, dirs_exist_ok=True, copy_function=shutil.copyfile, ignore=LEFT_BEHIND)
    os.chmod(output_dir, os.stat(output_dir).st_mode | 0o700)  # copytree gave it model_dir's, which may be read-only
    for name in weight_files(model_dir):
        shutil.copyfile(os.path.join(model_dir, name), os.path.join(output_dir, name))
    headers = tensor_headers(model_dir)
    for linear, delta in tqdm(deltas.items(), desc='merge', disable=None):
        tensor = headers[stored_name(headers, linear)]
        out, fan_in = tensor['shape']
        row_bytes = (tensor['end'] - tensor['begin']) // out
        with open(os.path.join(output_dir, tensor['file']), 'r+b') as f:
            f.seek(tensor['begin'])
            for row in range(0, out, 128):
                data = bytearray(f.read(min(128, out - row) * row_bytes))
                weight = torch.frombuffer(data, dtype=TORCH_DTYPES[tensor['dtype']]).view(-1, fan_in)  # (rows, in)
                weight += delta(slice(row, row + 128)).cpu()  # in `data`: added in float32, cast once
                f.seek(-len(data), os.SEEK_CUR)
                f.write(data)


# ======================================================================================================================
# The rest: what a run needs around the method.
# ======================================================================================================================

TORCH_DTYPES = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}
LEFT_BEHIND = shutil.ignore_patterns(  # all weights, the card, and what a run or cb_eval.py wrote beside a model
    '.*', '*.safetensors', '*.bin', '*.pt', '*.pth', '*.gguf', '*.h5', '*.msgpack', '*.onnx', '*.onnx_data', '*.ckpt',
    '*.partial', 'README.md', 'adapter', 'cb_config.json', 'log.jsonl', 'eval.json', 'generations.jsonl')
CHECKPOINT = 'checkpoint.pt'
MAY_DIFFER = ('resume', 'overwrite', 'output_dir', 'merge_adapter', 'log_interval', 'eval_interval', 'save_interval',
              'gradient_checkpointing', 'micro_batch_tokens', 'fsdp')  # between a run and its resume
NOT_ON_THE_CARD = ('_path', '_dir', '_name', '_from', '_template', 'device', 'rank', 'world')  # endings of options
PROBE = 'In the morning the boat left the harbour, and before noon the wind had turned and the sea was calm again.'
SIGNALS = ('SIGINT', 'SIGTERM')
TRY = 'raise learning_rate, max_steps or schedule_steps'

# ---- other losses, the start, recomputing, the adversary -------------------------------------------------------------

def random_direction_loss(h, h_lora, mask, layers, direction):
    """|| h' / ||h'|| - u ||, "RandP" in section 4 of the paper; direction u (D,) is a unit vector."""
    unit = {l: F.normalize(h_lora[l].float(), dim=-1) for l in layers}
    return sum(((unit[l] - direction).norm(dim=-1) * mask).sum() for l in layers) / len(layers)


def rmu_loss(h, h_lora, mask, layers, direction):
    """|| h' - c u ||^2 / D (arXiv 2403.03218); direction is c u (D,)."""
    return sum(((h_lora[l].float() - direction).square().mean(-1) * mask).sum() for l in layers) / len(layers)


def make_cb_loss(c, width, leak):
    """Returns the loss that cb_loss names. ADD A CB LOSS HERE, and to its choices in the comment of the option."""
    u = F.normalize(torch.rand(width, generator=torch.Generator().manual_seed(c.seed)), dim=0).to(c.device)
    return {'rr': functools.partial(rerouting_loss, leak=leak) if leak else rerouting_loss,
            'random': functools.partial(random_direction_loss, direction=u),
            'rmu': functools.partial(rmu_loss, direction=c.rmu_norm * u)}[c.cb_loss]


def root_mean_square(x):
    """Returns the root mean square of a tensor, a number, computed in float32."""
    return torch.linalg.vector_norm(x, dtype=torch.float32).item() / x.numel() ** 0.5


@torch.no_grad()
def input_embeddings(model):
    """Returns what a model's blocks get for each token, or every n-th to about 4096: (V, D). Gemma scales its table."""
    table = model.get_input_embeddings()
    every = math.ceil(table.num_embeddings / 4096)
    return table(torch.arange(0, table.num_embeddings, every, device=table.weight.device))


@torch.no_grad()
def draw_start(model, loras, batches, c):
    """
    Draws lora_B (normal) so that || h' - h || / || h ||, on average over micro-batches of Rows and target_layers, is
    c.lora_start.

    Where h' = h the cosine has no gradient: from lora_B = 0 rounding alone decides when, and whether, a run starts. The
    distance grows about linearly with lora_B, so a few corrections are enough. In half precision, where rounding moves
    states by 1 %, too, they are made for a start of 0.1. Returns the share that was reached.
    """
    draw, std, times = torch.Generator().manual_seed(c.seed), 1e-3, 1
    if model.dtype != torch.float32:
        times = max(1, 0.1 / c.lora_start)
    noise = {name: torch.randn(lora.lora_B.shape, generator=draw).to(c.device) for name, lora in loras.items()}
    for correction in range(4):
        for name, lora in loras.items():
            lora.lora_B.copy_(noise[name] * std)
        distance = 0.0
        for batch in batches:
            ids, mask = pad(batch, c.device)
            h, h_lora = reference_and_adapted(model, loras, ids)
            distance += retain_loss(h, h_lora, mask, c.target_layers).item()
        reached = distance / LLAMA3_NORM / sum(map(count, batches))
        std *= times * c.lora_start / max(reached, 1e-9)
    for lora in loras.values():
        lora.lora_B /= times
    return reached / times


def checkpoint_blocks(model):
    """Lets each block keep its input alone for the backward pass, which computes it again."""
    for block in model.layers:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def add_adversary(optimizer, embeddings, rows, c):
    """
    Returns soft (slots, soft_tokens, D), zeros, for the slots of Rows: vectors that the optimizer, by the gradient that
    the adapted pass has anyway, moves up the loss: without moments by signed steps, in units of the embeddings' root
    mean square, as attacks do. They find much more in few steps, and nothing of an earlier row stays: restart puts a
    new row's at noise of up to 'start'. Those of the run's first rows start at zero.
    """
    unit = root_mean_square(embeddings)
    slots = max(row.slot for row in rows) + 1
    soft = nn.Parameter(torch.zeros(slots, c.soft_tokens, embeddings.shape[1], device=c.device))
    optimizer.add_param_group({
        'params': [soft], 'lr': c.soft_lr * unit, 'start': c.soft_start * unit, 'betas': (0.0, 0.0), 'eps': 1e-12,
        'weight_decay': 0.0, 'maximize': True})
    return soft


def restart(soft, rows, earlier, most, seed):
    """
    Puts the vectors of soft (slots, S, D) whose Rows are others than in the step before (`earlier`) where an attack's
    may come to be: at noise of a size from 0 to `most`, the same on every rank. Near words alone an adversary finds the
    ways out that are there.
    """
    slots = [row.slot for row, before in zip(rows, earlier) if row.soft and row != before]
    draw = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    size = most * torch.rand(len(slots), 1, 1, generator=draw)
    soft.data[slots] = (size * torch.randn(len(slots), *soft.shape[1:], generator=draw)).to(soft.device)


def with_soft_tokens(rows, words, c, rng):
    """
    Yields the harmful Rows of a run, in a share of each step's rows 1 to soft_tokens of `words` (token ids) at the end
    of the request, where an attack puts its own: what is asked stays in sight. The adversary moves them; so that it can
    find what undoes the rerouting of this row, the row stays for soft_steps steps. The slots change theirs by turns.
    """
    slots, attacked = round(c.soft_contexts * rows_a_step(c)), {}
    for i, row in enumerate(rows):
        step, slot = divmod(i, rows_a_step(c))
        if slot < slots and (step == 0 or step % c.soft_steps == slot * c.soft_steps // slots):
            tokens = rng.choices(words, k=rng.randint(1, c.soft_tokens))
            attacked[slot] = inserted(row, row.end, row.end, tokens)._replace(soft=len(tokens), slot=slot)
        yield attacked.get(slot, row)


def soft_context(soft, rows, length):
    """Returns what is added to embeddings of Rows, (B, T, D): a row's vectors where its request ends, else zeros."""
    return torch.stack([F.pad(soft[row.slot, :row.soft], (0, 0, row.end, length - row.end - row.soft)) for row in rows])


def request_noise(rows, length, width, most, device):
    """
    Returns what is added to the embeddings of Rows padded to a length, (B, T, D): in half of the rows normal noise at
    the noisy places, its size drawn from 0 to `most`. A word that no row has is much like a known one with noise.
    """
    noisy = [[[row.noisy[0] <= i < row.noisy[1]] for i in range(length)] for row in rows]  # (B, T, 1)
    sizes, noise = torch.rand(len(rows), 1, 1, device=device), torch.randn(len(rows), length, width, device=device)
    return most * F.relu(2 * sizes - 1) * noise * torch.tensor(noisy, device=device)


# ---- several ranks ---------------------------------------------------------------------------------------------------

def summed(tensor):
    """Returns a tensor, by now its sum over the ranks, in place; a process alone has nothing to add."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def shard(model, device):
    """
    Divides the frozen blocks among the ranks (FSDP2): each holds 1 / ranks of the weights, and some blocks more while
    it computes. They come mapped from load_decoder, one by one, so that no memory has to hold the model, but for
    experts, which transformers stacks. LoRA, embedding and norm stay whole on each rank.
    """
    mesh = dist.init_device_mesh(device.partition(':')[0], (dist.get_world_size(),))
    for block in model.layers:
        lora = {p for p in block.parameters() if p.requires_grad}
        fully_shard(block.to(device), mesh=mesh, reshard_after_forward=True, ignored_params=lora)
    its_class = type(model)
    fully_shard(model, mesh=mesh, ignored_params=set(model.parameters()))  # the root fetches blocks ahead,
    model.__class__ = its_class  # and by the name of its own class transformers finds its hidden states


# ---- what a step says ------------------------------------------------------------------------------------------------

def check_step(streams, rows, record, state, c):
    """Ends a run with a figure not finite or step 0 not neutral; warns if by a fifth of the steps cb has not moved."""
    figures = ', '.join(f'{name} {value}' for name, value in record.items() if name.endswith(('_loss', '_norm')))
    if not all(map(math.isfinite, record.values())):
        where = ', '.join(row.where for stream in streams for row in rows[stream.name])
        last_word(f'fault: step {record["step"]}: {figures}: stopped before the optimizer step; the last checkpoint is '
                  f'kept; lower learning_rate or lorra_alpha, or use dtype=bfloat16 instead of float16; rows: {where}')
        sys.exit(1)
    neutral = min(record['retain_cos'], record['cb_cos']) >= 0.99
    if record['step'] == 0 and not c.init_from and c.lora_start < 0.05 and not neutral:
        sys.exit(f'fault: step 0: {figures}: the adapter is not neutral: cosines of at least 0.99 were wanted')
    state.setdefault('first_cb_loss', record['cb_loss'])
    if record['step'] == c.max_steps // 5 > 0 and record['cb_loss'] > 0.9 * state['first_cb_loss']:
        print(f'warning: by step {record["step"]} the cb loss has not moved a tenth; {TRY}', file=sys.stderr)


@torch.no_grad()
def validate(model, loras, streams, c):
    """
    Returns {'val_PREFIX_loss', 'val_PREFIX_cos', and 'val_PREFIX_cos_LAYER' for each of target_layers}: each stream's
    figures on its held-out rows, divided as a step's are, without dropout.
    """
    model.eval()
    means = {}
    for stream in streams:
        loss, *sums = summed(run_stream(model, loras, stream, my_batches(stream.held_out, c), c)).tolist()
        loss, layers = loss / stream.divisor(stream.held_out), [cos / count(stream.held_out) for cos in sums]
        means |= {f'val_{stream.prefix}_loss': loss, f'val_{stream.prefix}_cos': sum(layers) / len(layers)}
        means |= {f'val_{stream.prefix}_cos_{l}': cos for l, cos in zip(c.target_layers, layers)}
    for lora in loras.values():
        lora.train()
    return means


def verdict(record, streams):
    """Returns one line: are cosines of held-out harmful rows below 0.7 at each target layer, of benign above 0.9?"""
    harmful, benign = record['val_cb_cos'], record['val_retain_cos']
    layers = {name.rpartition('_')[2]: cos for name, cos in record.items() if name.startswith('val_cb_cos_')}
    rows = {stream.name: len(stream.held_out) for stream in streams}
    found = f'cos {harmful:.2f} on {rows["harmful"]} held-out harmful rows, {benign:.2f} on {rows["retain"]} benign'
    if not all(cos < 0.7 for cos in layers.values()):  # NaN is not below, either
        each = ', '.join(f'{cos:.2f} at layer {layer}' for layer, cos in layers.items())
        on_retain = record['cb_coeff'] < record['retain_coeff'] / 10  # a schedule that may have undone it all
        half_way = f'schedule_steps={2 * (record["step"] + 1)} ends half way, as published; or ' if on_retain else ''
        return f'warning: NOT rerouted: {found}; harmful states: {each}, below 0.7 wanted: {half_way}{TRY}'
    if not benign > 0.9:
        return f'warning: rerouted, but benign states moved too: {found}; lower learning_rate, or raise max_steps'
    return f'rerouted: {found}; whether its harmful answers are gone, python cb_eval.py measures'


# ---- the base model --------------------------------------------------------------------------------------------------

def stored_name(headers, linear):
    """Returns the checkpoint's name for the weight of a decoder's linear: 'model.layers.0...' for 'layers.0...'."""
    found = [name for name in headers if f'.{name}'.endswith(f'.{linear}.weight')]
    return found[0] if len(found) == 1 else fail(f'the checkpoint has {len(found)} tensors {linear}.weight, one wanted')


def truncated_config(model_dir, blocks):
    """Returns the model's config with only the first `blocks` blocks, and the number of blocks that there are."""
    config = AutoConfig.from_pretrained(model_dir)
    total = config.num_hidden_layers
    for name, value in config.to_dict().items():  # as layer_types of Qwen and Gemma
        if isinstance(value, list) and len(value) == total:
            setattr(config, name, value[:blocks])
    config.num_hidden_layers = blocks
    return config, total


def load_decoder(model_dir, blocks, dtype, device, mapped=False):
    """
    Returns the first `blocks` blocks of the decoder with its embedding and final norm; the rest is never read. mapped:
    the blocks stay on the CPU, mapped from the files.
    """
    config, total = truncated_config(model_dir, blocks)
    model, report = AutoModel.from_pretrained(model_dir, config=config, dtype=dtype, use_safetensors=True,
                                              output_loading_info=True, ignore_mismatched_sizes=True)  # told below
    half = model.dtype != torch.float32
    flash = model._supports_flash_attn and not getattr(model, '_compatible_flash_implementations', None)  # own kernels
    if half and device == 'cpu':
        model.set_attn_implementation('eager')  # sdpa's backward pass is slow there
    elif half and device.startswith('cuda') and flash and is_flash_attn_2_available():
        with or_fail('flash-attn is installed and cannot be used here: install it anew, or uninstall it'):
            model.set_attn_implementation('flash_attention_2')
    dropped = re.compile(rf'(^|\.)(lm_head\.|embed_out\.|layers\.({"|".join(map(str, range(blocks, total)))})\.)')
    unexpected = [name for name in report['unexpected_keys'] if not dropped.search(name)]
    wrong = [*report['missing_keys'], *report['mismatched_keys'], *unexpected]
    if wrong:
        fail(f'{model_dir}: {len(wrong)} weights are missing or do not fit, the first is {wrong[0]}')
    layers = model.layers
    model.layers = nn.ModuleList() if mapped else layers
    model.to(device)
    model.layers = layers
    return model.eval()


def check_model(model_dir, c):
    """Returns {linear that gets a LoRA: (out, in)} and how many blocks are kept."""
    depth = decoder_config(model_dir).num_hidden_layers
    blocks = c.num_hidden_layers or min(max(c.target_layers) + 1, depth)
    if max(c.target_layers) > depth:
        fail(f'target_layers={c.target_layers} found, but {model_dir} has {depth} blocks; as deep as 10 and 20 of 32: '
             f'--target_layers={round(depth * 10 / 32)},{round(depth * 20 / 32)}')
    if blocks > depth:
        fail(f'num_hidden_layers={blocks} found, but {model_dir} has {depth} blocks')
    if max(c.layers_to_transform, default=0) >= blocks:
        fail(f'layers_to_transform={c.layers_to_transform} found, but {blocks} blocks are kept: 0 to {blocks - 1}')
    if min(c.layers_to_transform, default=0) >= min(c.target_layers) and not c.merge_only:
        fail(f'layers_to_transform={c.layers_to_transform} found, but state {min(c.target_layers)} of target_layers is '
             'the one before all of these blocks, and cannot move')
    with or_fail(f'{model_dir}: not a model that transformers can build'), torch.device('meta'):
        model = AutoModel.from_config(truncated_config(model_dir, blocks)[0])  # its shape without its weights
    if not isinstance(getattr(model, 'layers', None), nn.ModuleList):
        fail(f'{model_dir}: {type(model).__name__} keeps its blocks in another way; a decoder with .layers wanted')
    headers, shapes = tensor_headers(model_dir), {}
    for i in c.layers_to_transform or range(blocks):
        linears = {f'layers.{i}.{name}': module
                   for name, module in model.layers[i].named_modules() if isinstance(module, nn.Linear)}
        for target in c.target_modules:
            found = [name for name in linears if name.rpartition('.')[2] == target]
            if not found:
                names = ', '.join(dict.fromkeys(name.rpartition('.')[2] for name in linears))
                fail(f'target_modules: block {i} has no linear layer {target!r}, but {names}')
            for name in found:
                tensor, shapes[name] = headers[stored_name(headers, name)], tuple(linears[name].weight.shape)
                if tensor['dtype'] not in TORCH_DTYPES or tuple(tensor['shape']) != shapes[name]:
                    fail(f'{model_dir}: {name}: {tensor["dtype"]} {tensor["shape"]} found, {list(shapes[name])} in one '
                         f'of {", ".join(TORCH_DTYPES)} wanted')
    return shapes, blocks


def base_files(model_dir):
    """Returns what tells whether the base was changed: {file: [bytes, time of its last change in ns]}."""
    stats = {name: os.stat(os.path.join(model_dir, name)) for name in ['config.json', *weight_files(model_dir)]}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


# ---- the adapter in PEFT's format ------------------------------------------------------------------------------------

def save_adapter(folder, loras, base, c):
    """Writes the LoRA in PEFT's format; base: what the whole model calls its decoder ('model')."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for name, lora in loras.items():
        tensors[f'base_model.model.{base}.{name}.lora_A.weight'] = lora.lora_A.detach().cpu()
        tensors[f'base_model.model.{base}.{name}.lora_B.weight'] = lora.lora_B.detach().cpu() * lora.unit
    save_file(tensors, folder / 'adapter_model.safetensors', metadata={'format': 'pt'})
    (folder / 'adapter_config.json').write_text(json.dumps({
        'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': c.model_name, 'r': c.lora_r,
        'lora_alpha': c.lora_alpha, 'lora_dropout': c.lora_dropout, 'bias': 'none', 'inference_mode': True,
        'target_modules': sorted({name.rpartition('.')[2] for name in loras}), 'layers_pattern': 'layers',
        'layers_to_transform': sorted({int(name.split('.')[1]) for name in loras})}, indent=2))


def read_adapter(folder, shapes, c):
    """Returns an adapter in PEFT's format, {'LINEAR.lora_A.weight': (r, in), '...lora_B...': (out, r)}, if it fits."""
    with or_fail(f'init_from: {folder}: adapter_config.json and adapter_model.safetensors of PEFT wanted'):
        config = dict(json.load(open(os.path.join(folder, 'adapter_config.json'), encoding='utf-8')))
        stored = load_file(os.path.join(folder, 'adapter_model.safetensors'))
    told_by_no_shape = {'r': c.lora_r, 'lora_alpha': c.lora_alpha, 'use_rslora': False, 'alpha_pattern': {}}
    for key, value in told_by_no_shape.items():
        if (config.get(key, value) or None) != (value or None):
            fail(f'init_from: {folder}: {key}={config[key]!r} found, {value!r} wanted, as the options say')
    stored = {re.sub(r'^.*?(?=layers\.\d)', '', name): tensor.float() for name, tensor in stored.items()}
    wanted = {f'{name}.lora_A.weight': (c.lora_r, fan_in) for name, (out, fan_in) in shapes.items()}
    wanted |= {f'{name}.lora_B.weight': (out, c.lora_r) for name, (out, fan_in) in shapes.items()}
    found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    for name, _ in sorted(wanted.items() ^ found.items()):  # what one of the two alone holds
        fail(f'init_from: {folder}: {name}: {found.get(name, "nothing")} found, {wanted.get(name, "nothing")} wanted, '
             'as the model, target_modules and layers_to_transform say')
    return stored


# ---- a run that cannot be lost ---------------------------------------------------------------------------------------

def save_checkpoint(path, parameters, optimizer, state):
    """Writes {name: parameter}, AdamW's state and the run's (a dict) as one file: synced, then renamed."""
    tensors, data = {name: parameter.detach() for name, parameter in parameters.items()}, io.BytesIO()
    torch.save({'state': state, 'parameters': tensors, 'optimizer': optimizer.state_dict()}, data)
    with open(path + '.new', 'wb') as f:
        f.write(data.getbuffer())
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + '.new', path)


def read_checkpoint(path):
    """Returns what save_checkpoint wrote, on the CPU."""
    with or_fail(f'{path}: truncated or corrupt; start the run anew with --overwrite=True'):
        return torch.load(path, map_location='cpu', weights_only=True)


def check_same_run(path, found, wanted):
    """Compares two states of a run, a checkpoint's and this one's, in options, rows and base."""
    differ = [f'{name}={wanted["options"].get(name)!r} (was {value!r})' for name, value in found['options'].items()
              if wanted['options'].get(name) != value]
    differ += [f'the {name} changed' for name in ('rows', 'base') if found[name] != wanted[name]]
    if differ:
        fail(f'resume: this is another run than {path}: {"; ".join(differ)}; give the options of that run, or start '
             'anew with --overwrite=True')


# ---- checks, rows, output --------------------------------------------------------------------------------------------

def rows_a_step(c):
    """Returns how many rows of each set a step has."""
    return c.batch_size * c.gradient_accumulation_steps


def check_options(c):
    """Checks what no single option says: whether they fit each other and the number of ranks."""
    for name in ('target_layers', 'target_modules', 'contexts', 'retain_contexts', 'output_dir'):
        if not getattr(c, name):
            fail(f'an empty {name} found, at least one wanted')
    for name in ('target_layers', 'target_modules', 'layers_to_transform'):
        if len(set(getattr(c, name))) < len(getattr(c, name)):
            fail(f'{name}={getattr(c, name)} found, with one twice, each once wanted')
    if c.num_hidden_layers and max(c.target_layers) > c.num_hidden_layers:
        fail(f'target_layers={c.target_layers} found, but num_hidden_layers keeps {c.num_hidden_layers} blocks')
    if len(c.cb_lengths) != 2:
        fail(f'cb_lengths={c.cb_lengths} found, two numbers wanted: of the request and of the answer')
    if c.merge_only and not (c.init_from and c.merge_adapter):
        fail('merge_only=True without init_from, or with merge_adapter=False, found, an adapter to merge wanted')
    if c.soft_contexts and not round(c.soft_contexts * rows_a_step(c)):
        fail(f'soft_contexts={c.soft_contexts} found, of {rows_a_step(c)} rows a step none, at least one wanted')
    if (c.broken or c.opening) and c.loss_on == 'all':
        fail(f'broken={c.broken}, opening={c.opening}, loss_on=all found, loss_on=harmful_response wanted')
    if c.world > rows_a_step(c) and not c.merge_only:
        fail(f'{c.world} ranks and {rows_a_step(c)} rows of each set a step found, a row for each rank wanted')
    if c.world > 1 and c.device not in ('auto', 'cpu', 'cuda'):
        fail(f'device={c.device} and {c.world} ranks found, auto, cpu or cuda wanted')
    ranks_here, gpus = int(os.environ.get('LOCAL_WORLD_SIZE', 1)), torch.cuda.device_count()
    if c.device != 'cpu' and 0 < gpus < ranks_here:
        fail(f'{ranks_here} ranks and {gpus} GPUs found, a GPU for each rank of a machine wanted')
    if c.fsdp and not dist.is_initialized():
        fail('fsdp=True without ranks found, torchrun --nproc_per_node=N cb_train.py ... wanted')


def load_sets(c, tokenizer):
    """
    Returns the Rows of the run and those held out, {'retain', 'harmful': [Row]} each. A tenth of a set, at most 60
    rows, is held out without val_data_path, or where no label there means the set. ADD A STREAM'S ROWS TO `sets`.
    """
    benign = functools.partial(messages_of, answers=BENIGN_ANSWERS)
    harmful = functools.partial(messages_of, answers=HARMFUL_ANSWERS)
    sets = {
        'retain': load_rows(c.retain_data_path, benign, 'train_sft', c.num_retain_examples, c.seed, 'retain_data_path'),
        'harmful': load_rows(c.cb_data_path, harmful, 'train', c.num_cb_examples, c.seed, 'cb_data_path')}
    val_rows = load_rows(c.val_data_path, labelled, option='val_data_path') if c.val_data_path else []
    labels = {'retain': 'benign', 'harmful': 'harmful'} if c.val_data_path else {}  # of a set's rows there
    held, rows, held_out = {}, {}, {}
    for name, conversations in sets.items():
        held[name] = [(where, messages) for where, (label, messages) in val_rows if label == labels.get(name)]
        if name not in labels:
            tenth = min(60, math.ceil(len(conversations) / 10))
            held[name] = random.Random(f'{c.seed} val').sample(conversations, tenth)
            texts = [messages for _, messages in held[name]]
            sets[name] = [row for row in conversations if row[1] not in texts] or conversations
            if sets[name] is conversations:
                print(f'warning: {name}: all rows are alike, so those held out are trained on', file=sys.stderr)
    benign_rows = sets['retain']
    for name, option in (('harmful', 'contexts'), ('retain', 'retain_contexts')):
        contexts, rng = getattr(c, option), random.Random(f'{c.seed} {option}')
        if contexts != ['own']:
            sets[name] = list(in_contexts(sets[name], benign_rows, contexts, rng))
            held[name] = rng.sample(list(in_contexts(held[name], benign_rows, contexts, rng)), len(held[name]))
    extra, rng = round(c.scrambled * len(sets['retain'])), random.Random(f'{c.seed} scrambled')
    sets['retain'] = [*sets['retain'], *scrambled_rows(sets['harmful'], sets['retain'], extra, rng)]

    for name, conversations in sets.items():
        def to_row(messages, where):
            lengths, opening = (c.cb_lengths, c.opening) if name == 'harmful' else ((0, 0), 0)
            ids, head, answer = encode(tokenizer, messages, c.max_seq_length, lengths)
            tail = template_ends(tokenizer, tokenizer.chat_template)[1]
            behind = len(tail) if ids[answer - len(tail):answer] == tail else 0  # 0: the request was cut
            end = min(len(ids), max(head, answer - behind))
            noisy = (head, head) if name == 'harmful' else (1, end)  # the first token is, in many models, a sink
            return Row(ids, token_mask(ids, name, c.loss_on, head, answer + opening), where, end, noisy=noisy)
        needed, order = c.max_steps * rows_a_step(c), f'{c.seed} {name}'
        rows[name] = rows_of_run(conversations, needed, order, to_row, f'{name} rows')
        held_from = f'val_data_path: {labels[name]}' if name in labels else f'held-out {name} rows'
        held_out[name] = rows_of_run(held[name], 0, order, to_row, held_from)
    special, rng = set(tokenizer.all_special_ids), random.Random(f'{c.seed} words')
    words = [token for row in rows['retain'] for token in row.ids if token not in special]
    asks = lambda row: row.noisy[0] < row.end  # has a request
    some = [broken_row(row, words, rng) if rng.random() < c.broken else row for row in rows['harmful']]
    some = [strange_row(row, words, rng) if asks(row) and rng.random() < c.strange else row for row in some]
    rows['harmful'] = list(with_soft_tokens(some, words, c, rng))
    return rows, held_out


def model_card(c, rows, record):
    """Returns README.md of output_dir, for the hub; record: the last step's ({} = not trained)."""
    hub_id = not os.path.isdir(c.model_name)
    numbers = ', '.join(f'{len({row.where for row in some})} {name} rows' for name, some in rows.items())
    made = f'Trained on {numbers}: {record.get("verdict")}.'
    recipe = {name: value for name, value in vars(c).items()
              if name not in MAY_DIFFER and not name.endswith(NOT_ON_THE_CARD)}
    if c.merge_only:
        made = f'Nothing was trained in this run: it merged the adapter of `{c.init_from}`.'
        recipe = {name: recipe[name] for name in ('lora_r', 'lora_alpha', 'target_modules')}
    return '\n'.join([
        '---', *([f'base_model: {c.model_name}'] if hub_id else []), 'library_name: transformers',
        'tags: [circuit-breakers, representation-rerouting]', '---', f'# {os.path.basename(c.output_dir)}', '',
        f'{c.model_name if hub_id else "A local model"} with circuit breakers (arXiv 2406.04313).', made, '',
        '| option | value |', '|---|---|', *(f'| {name} | {value} |' for name, value in recipe.items()), '',
        '## Evaluation', '', 'Not evaluated yet: run cb_eval.py.', ''])


def save_merged(model_dir, partial, loras, probe, frozen, adapted, blocks, base, c):
    """
    Writes the merged model into `partial`, loads it again and compares its states on probe, ids (1, T) of a real text
    (on others a rounding may turn a sink on or off), with those of the adapter off and on. Returns how far it is from
    the adapted one: the largest, over layers, of the mean over tokens of || a - b || / || a ||. base: base_files at the
    start. With fsdp it runs on the CPU, from its files: any size fits.
    """
    def apart(states, others):
        a, b = (torch.stack(some[1:]).float().cpu() for some in (states, others))  # (L, B, T, D)
        return ((a - b).norm(dim=-1) / a.norm(dim=-1).clamp(min=1e-6)).mean((1, 2)).max().item()  # NaN stays NaN

    now = base_files(model_dir)
    changed = [name for name in base if now.get(name) != base[name]]
    if changed:
        sys.exit(f'fault: {os.path.join(model_dir, changed[0])} has changed since the training began: merging '
                 'would mix two models; put it back and go on with --resume=True, or start anew')
    merge(model_dir, partial, {name: lora.delta for name, lora in loras.items()})
    if c.chat_template:
        template = pathlib.Path(c.chat_template).read_text('utf-8-sig')
        pathlib.Path(partial, 'chat_template.jinja').write_text(template, 'utf-8')
    if c.fsdp:
        torch.set_num_threads(os.cpu_count())  # the other ranks, for whose sake torchrun says one, have ended
    merged = load_decoder(partial, blocks, c.dtype, 'cpu' if c.fsdp else c.device)
    with torch.no_grad():
        found = hidden_states(merged, probe.to(merged.device))
    off, moved = apart(adapted, found), apart(adapted, frozen)
    exact = c.dtype == 'auto' and merged.dtype == torch.float32
    if not off <= (1e-3 if exact else max(0.05, moved / 2)):  # half precision rounds the sum of weight and delta once
        sys.exit(f'fault: {partial}: the merged model, reloaded, is {off:.1e} away from the adapted one: not moved')
    return off


if __name__ == '__main__':
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))  # as torchrun sets them
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, 'w')  # rank 0 speaks and writes for all
    config = configure(__file__, sys.argv[1:])
    if 'RANK' in os.environ:
        dist.init_process_group('gloo' if config['device'] == 'cpu' else None)  # None: nccl where there are GPUs
    sys.excepthook = fault
    stop_at_signals()

    # everything that the user may have got wrong, before the model is loaded or anything written
    c = types.SimpleNamespace(**config, rank=rank, world=world)
    check_options(c)
    c.output_dir = os.path.realpath(c.output_dir)  # a link stays, and what it points to is written
    partial = c.output_dir + '.partial'
    checkpoint_path = os.path.join(partial, CHECKPOINT)
    model_dir = find_model(c.model_name)
    if rank == 0:
        check_output('output_dir', c.output_dir, (CHECKPOINT, 'cb_config.json', 'log.jsonl'), c.overwrite, c.resume)
        for folder in (c.output_dir, partial, c.output_dir + '.old'):
            if os.path.commonpath([folder, os.path.realpath(model_dir)]) in (folder, os.path.realpath(model_dir)):
                fail(f'output_dir: {folder} and the model, {model_dir}, lie one in the other; choose another')
        if os.path.isdir(partial):
            locked('output_dir', partial).release()
    saved = read_checkpoint(checkpoint_path) if c.resume and os.path.exists(checkpoint_path) else None
    config['date'] = c.date = c.date or (saved['state']['options']['date'] if saved else time.strftime('%Y-%m-%d'))
    c.device = choose_device(c.device)
    if c.device == 'mps' and c.gradient_checkpointing and c.lora_dropout and not c.merge_only:
        fail(f'lora_dropout={c.lora_dropout} found, 0 wanted with gradient_checkpointing on mps, where torch computes '
             'a block again with other dropout')
    if world > 1 and c.device == 'cuda':
        c.device = f'cuda:{os.environ["LOCAL_RANK"]}'
    if c.device.startswith('cuda:'):
        torch.cuda.set_device(c.device)
    c.micro_batch_tokens = c.micro_batch_tokens or (512 if c.device == 'cpu' else 2048)
    shapes, blocks = check_model(model_dir, c)
    adapter = read_adapter(c.init_from, shapes, c) if c.init_from else {}
    needs_tokens = c.chat_template or not c.merge_only
    tokenizer = load_tokenizer(model_dir, c.chat_template, c.date) if needs_tokens else None
    rows, held_out = ({}, {}) if c.merge_only else load_sets(c, tokenizer)
    text = held_out['harmful'][0].ids if held_out else list(range(16)) * 2
    if c.merge_only:
        with contextlib.suppress(OSError, ValueError):  # a model may come without its tokenizer
            text = AutoTokenizer.from_pretrained(model_dir)(PROBE).input_ids
    ids_and_masks = [[row[:2] for some in (*rows.values(), *held_out.values()) for row in some]]
    base = saved['state']['base'] if saved and rank else base_files(model_dir)  # another machine's copy: other times
    state = {'options': {**{name: value for name, value in config.items() if name not in MAY_DIFFER}, 'ranks': world},
             'rows': hashlib.sha256(json.dumps(ids_and_masks).encode()).hexdigest(), 'base': base,
             'step': 0, 'tokens': 0, 'seconds': 0.0, 'log_bytes': 0, 'record': {}}
    if saved:
        check_same_run(checkpoint_path, saved['state'], state)
        state = saved['state']
    if dist.is_initialized():
        runs = [None] * world
        dist.all_gather_object(runs, [config, c.micro_batch_tokens, state['rows'], state['step']])
        if any(run != runs[0] for run in runs):
            fail('the ranks have other options, rows or checkpoints; the same files for each rank wanted')

    # the model: truncated, frozen, with a LoRA beside each of its target linears
    torch.manual_seed(c.seed)
    model = load_decoder(model_dir, blocks, c.dtype, c.device, mapped=c.fsdp)
    relative = c.lora_scale == 'relative' and not c.merge_only
    layers = c.layers_to_transform or range(blocks)
    loras = add_lora(model, c.target_modules, layers, c.lora_r, c.lora_alpha, c.lora_dropout, relative)
    if c.gradient_checkpointing:
        checkpoint_blocks(model)
    if c.fsdp:
        shard(model, c.device)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}  # the LoRAs'
    optimizer = torch.optim.AdamW(parameters.values(), lr=c.learning_rate, weight_decay=c.weight_decay)
    trainable, soft = sum(p.numel() for p in parameters.values()), None
    embeddings = input_embeddings(model)
    if c.soft_contexts and not c.merge_only:
        soft = parameters['soft'] = add_adversary(optimizer, embeddings, rows['harmful'], c)
    if saved:
        for name, parameter in parameters.items():
            parameter.data.copy_(saved['parameters'][name])
        optimizer.load_state_dict(saved['optimizer'])
    elif adapter:
        for name, lora in loras.items():
            lora.lora_A.data.copy_(adapter[f'{name}.lora_A.weight'])
            lora.lora_B.data.copy_(adapter[f'{name}.lora_B.weight'] / lora.unit)
    elif c.lora_start:
        first = [micro_batches(some[:4], c.batch_size, c.micro_batch_tokens) for some in rows.values()]
        draw_start(model, loras, sum(first, []), c)  # on the same rows on every rank

    # the output directory is ours from here on, as every rank has seen it: emptied, or cut back to the checkpoint
    log, save = sys.stdout, lambda state: None
    if rank == 0:
        os.makedirs(partial, exist_ok=True)
        lock = locked('output_dir', partial)
        for name in set(os.listdir(partial)) - {'lock', 'log.jsonl', CHECKPOINT if saved else ''}:
            path = os.path.join(partial, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
        log = open(os.path.join(partial, 'log.jsonl'), 'a', encoding='utf-8')
        log.truncate(state['log_bytes'])
        save = functools.partial(save_checkpoint, checkpoint_path, parameters, optimizer)
    if not saved:
        save(state)
    for name, value in config.items():
        print(f'{name} = {value!r}')
    print(f'{world} x {c.device}, {model.dtype}, {model.config._attn_implementation} attention; {blocks} blocks, '
          f'{len(loras)} LoRAs, {trainable:,} trainable parameters')
    for name, some in rows.items():
        print(f'{name}: {len({row.where for row in some})} rows are read, {len(held_out[name])} held out; a step has '
              f'{len(some) // c.max_steps} rows and about {count(some) // c.max_steps} tokens that count')
    if c.resume:
        print(f'resumed at step {state["step"]}' if saved else 'no checkpoint to resume from: starting at step 0')

    # train
    if not c.merge_only:
        streams = make_streams(c, rows, held_out, blocks, embeddings, soft)
        train(model, loras, optimizer, streams, c, state, save, log)
    stop_at_signals()
    with torch.no_grad():
        # sharded blocks need every rank: before they leave
        probe = torch.tensor([text[:64]], device=c.device)
        frozen, adapted = reference_and_adapted(model.eval(), loras, probe)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank:
        sys.exit()

    # save all of it, under its own name when it is complete
    save_adapter(pathlib.Path(partial, 'adapter'), loras, model.base_model_prefix, c)
    versions = {'torch': torch.__version__, 'transformers': transformers.__version__}
    saved = {**config, 'ranks': world, 'verdict': state['record'].get('verdict', ''), 'versions': versions}
    pathlib.Path(partial, 'cb_config.json').write_text(json.dumps(saved, indent=2) + '\n')
    pathlib.Path(partial, 'README.md').write_text(model_card(c, rows, state['record']), 'utf-8')
    message = 'the adapter alone, in PEFT\'s format, in adapter/'
    if c.merge_adapter:
        for lora in loras.values():
            lora.base = None  # of the model, only the deltas are needed
        del model
        gc.collect()
        off = save_merged(model_dir, partial, loras, probe, frozen, adapted, blocks, state['base'], c)
        message = f'merged and reloaded; its states are {off:.1e} away from the adapted model\'s'
    log.close()
    lock.release()
    for name in ('lock', CHECKPOINT):
        os.remove(os.path.join(partial, name))
    publish(partial, c.output_dir)
    print(f'{c.output_dir}: {message}')
    print(state['record'].get('verdict', 'nothing was trained'))
