"""A tiny random model, rows and a way to run a script in this process, for all tests."""
import functools
import gc
import io
import json
import os
import signal
import sys

os.environ |= {'HF_HUB_OFFLINE': '1', 'HF_DATASETS_DISABLE_PROGRESS_BARS': '1', 'OMP_NUM_THREADS': '1'}  # tiny models: a thread is enough
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import filelock
import pytest

WORDS = 'red green blue one two three please tell me about apples pears plums yes no'.split()


SHAPE = dict(vocab_size=6 + len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, bos_token_id=2, eos_token_id=3, pad_token_id=0, initializer_range=0.2)


def make_model_dir(path, dtype=None, shard='30KB', config=None):
    """A tiny random model (a 4-block Llama, or what `config` says) in several shards, with a tokenizer and a chat template."""
    import torch  # here, as pytest-xdist's controller, which runs no test, reads this file before its workers do
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
    special = ['<pad>', '<unk>', '<bos>', '<end>', '<user>', '<assistant>']
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token='<unk>'))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token='<pad>', unk_token='<unk>', bos_token='<bos>', eos_token='<end>', clean_up_tokenization_spaces=False,
        chat_template="{{ bos_token }}{% for m in messages %}{{ ' <' + m.role + '> ' + m.content + ' <end>' }}{% endfor %}"
                      "{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**SHAPE))
    model.to(dtype or torch.float32).save_pretrained(path, max_shard_size=shard)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope='session')
def model_dir(tmp_path_factory):
    return make_model_dir(tmp_path_factory.mktemp('tiny') / 'model')


def write_rows(folder):
    """Harmless rows in the real shapes: {'cb': path of a JSON array, 'retain': path of JSON lines, 'val': the same with labels}."""
    cb = [{'prompt': f'tell me about {a} apples', 'response': f'{b} {b} apples yes'} for a in WORDS[:6] for b in WORDS[:2]]
    retain = [{'messages': [{'role': 'user', 'content': f'please tell me {a}'}, {'role': 'assistant', 'content': 'no plums ' * k}]}
              for a in WORDS[:5] for k in (1, 3)]
    val = [{**cb[0], 'label': 'harmful'}, {**retain[0], 'label': 'benign'}, {**retain[1], 'label': 'benign'}]
    paths = {name: os.path.join(folder, f'{name}.json' + ('l' if name != 'cb' else '')) for name in ('cb', 'retain', 'val')}
    for name, text in (('cb', json.dumps(cb)), ('retain', '\n'.join(map(json.dumps, retain))), ('val', '\n'.join(map(json.dumps, val)))):
        with open(paths[name], 'w') as f:
            f.write(text)
    return paths


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path)


def pytest_collection_finish():
    """What was imported stays: no collection goes through it again, nor does `run`, which looks at every other object."""
    gc.collect()
    gc.freeze()


@functools.lru_cache
def compiled(path):
    """A script as code, compiled once."""
    with open(path, encoding='utf-8') as f:
        return compile(f.read(), path, 'exec')


def run_script(script):
    """Runs a script under sys.argv in this process, ends it as the interpreter does, and returns its exit status."""
    path = os.path.join(ROOT, script)
    try:
        exec(compiled(path), {'__name__': '__main__', '__file__': path})
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        return e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def fork_script(arguments, stdout, stderr, prepare=lambda: None):
    """
    Runs cb_train.py in a fork of this process, which has imported everything already, after prepare(); what it prints goes to two files.
    Returns its process id.
    """
    child, status = os.fork(), 99
    if child:
        return child
    try:
        prepare()
        for number, path in ((1, stdout), (2, stderr)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = (open(number, 'w', buffering=1, closefd=False) for number in (1, 2))
        sys.argv = ['cb_train.py', *arguments]
        status = run_script('cb_train.py')
    finally:
        os._exit(status)


@pytest.fixture
def run(monkeypatch, capsys):
    """run('cb_train.py', '--max_steps=3', ...) as on the command line, in this process: (exit status, stdout, stderr)."""
    def go(script, *arguments):
        monkeypatch.setattr(sys, 'argv', [script, *map(str, arguments)])
        hook = sys.excepthook  # the scripts set their own, and signal handlers
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            status = run_script(script)
        finally:
            sys.excepthook = hook
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for item in gc.get_objects():  # a process that ends closes its files and gives back its locks
                if type(item) is io.TextIOWrapper and not item.closed:
                    if str(getattr(item.buffer, 'name', '')).endswith('log.jsonl'):
                        item.close()
                elif type(item) is filelock.FileLock:
                    item.release(force=True)
        return status, *capsys.readouterr()
    return go
