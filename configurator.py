"""
Python-file configs and --key=value overrides, after nanoGPT, with an engine that knows types.

    python cb_train.py config/llama3.py --max_steps=150 --target_layers 5,6 --overwrite=True

A script keeps its options, one `name = value  # comment` a line, between two lines `# -----`. The default's type decides
what is accepted. Config files are Python (they are executed: run only those you trust); later files win, and the command
line wins over all files. A config file may serve several scripts: it may set the options of any script beside this one,
while the command line takes only the options of the script that is run. A mistake is one line and exit status 2.
"""
import ast
import difflib
import errno
import glob
import math
import os
import re
import runpy
import shutil
import sys
import traceback
import types

FENCE = re.compile(r'# -{20,}\n(.*?)^# -{20,}\n', re.S | re.M)


def last_word(text):
    """
    What a program that ends says, on stderr. Of torchrun's ranks on a machine only the first that ends has a say, whichever it is: the
    others made the same mistake, or end because it is gone.
    """
    folder = os.path.dirname(os.path.dirname(os.environ.get('TORCHELASTIC_ERROR_FILE', '')))  # all ranks', by torchrun, for this run alone
    try:
        if folder:
            os.close(os.open(os.path.join(folder, 'last_word'), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    except OSError:  # nowhere to agree: better twice than not at all
        pass
    print(text, file=sys.stderr if os.environ.get('RANK', '0') == '0' else sys.__stderr__, flush=True)


def fail(message):
    """Ends the program for a mistake of its user: one line on stderr, exit status 2."""
    last_word('error: ' + ' '.join(str(message).split()))
    sys.exit(2)


def fault(kind, error, trace):
    """A sys.excepthook: what the machine does to a run is one line, and the exit status 1; a traceback is for bugs."""
    text = str(error.args[0][0][2] if issubclass(kind, shutil.Error) else error)  # copytree gathers one a file
    if kind.__name__ == 'OutOfMemoryError' or issubclass(kind, MemoryError) or "can't allocate memory" in text:
        line = ('out of memory: set gradient_checkpointing=True or lower micro_batch_tokens, and go on with --resume=True where there is a checkpoint; '
                'or lower max_seq_length; for cb_eval.py, lower eval_batch_size')
    elif issubclass(kind, OSError) or kind.__name__ == 'SafetensorError':
        full = getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or re.search('No space|File too large|quota', text)
        line = (f'{"the disk is full" if full else "the disk failed"}: {text}; the output that was there before is whole, and a training run goes on '
                'from its last checkpoint with --resume=True')
    elif issubclass(kind, KeyboardInterrupt):
        line = 'interrupted: the output that was there before is whole'
    elif kind.__name__.startswith('Dist') or 'gloo' in text:  # torch's DistBackendError, ..., or RuntimeError
        line = 'lost another rank, which died or was killed: torchrun says below which; go on from the last checkpoint with --resume=True'
    else:
        return last_word(''.join(traceback.format_exception(kind, error, trace)).rstrip())
    last_word(f'fault: {"rank " + os.environ["RANK"] + ": " if "RANK" in os.environ else ""}' + ' '.join(line.split()))


def options(script):
    """The fenced block of a script as [(name or None, default, comment)], in order; None marks a heading. No fence: []."""
    fenced = FENCE.search(open(script, encoding='utf-8').read())
    rows = []
    for line in fenced[1].splitlines() if fenced else []:
        code, _, comment = line.partition('#')  # so a default may not hold a '#'
        if '=' in code:
            name, value = code.split('=', 1)
            rows.append((name.strip(), ast.literal_eval(value.strip()), comment.strip()))
        elif comment:
            rows.append((None, None, comment.strip()))
    return rows


def kind(default):
    """The type of an option in words, for messages."""
    if isinstance(default, list):
        return f'a list of {type((default or [""])[0]).__name__}, as 5,6 or [5,6]'
    return {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'a text'}[type(default)]


def checked(value, default):
    """A Python value as the type of `default` (int for a float, 1e3 for an int, 0 / 1 for a bool); ValueError if it is not."""
    if isinstance(default, list) and isinstance(value, (list, tuple, range)):
        return [checked(v, (default or [''])[0]) for v in value]
    if isinstance(default, str) and isinstance(value, str):
        return value
    if default == 'auto' and isinstance(value, bool):  # a switch that may be left to the script
        return str(value)
    if isinstance(default, bool) and value in (0, 1):
        return bool(value)
    if isinstance(default, (int, float)) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(default, float) and math.isfinite(value):
            return float(value)
        if type(default) is int and math.isfinite(value) and value == int(value):
            return int(value)
    raise ValueError


def parsed(text, default):
    """The text behind --key= as the type of `default`; ValueError if it cannot be read so."""
    if isinstance(default, str):
        return text
    if isinstance(default, list):
        parts = re.sub(r'^\[(.*)\]$', r'\1', text.strip()).split(',')
        return [parsed(p.strip().strip('"\''), (default or [''])[0]) for p in parts if p.strip()]
    if isinstance(default, bool):
        return {'true': True, '1': True, 'false': False, '0': False}[text.strip().lower()]
    return checked(int(text) if re.fullmatch(r'\s*[+-]?\d+\s*', text) else float(text), default)


def configure(script, argv):
    """
    The options of `script` (its path): its fenced defaults, then the config files in argv, then the --key=value of argv.
    Returns {name: value} in the script's order. Any mistake: one line and exit status 2. --help: prints and exits 0.
    """
    rows = options(script)
    own = {name: default for name, default, _ in rows if name}
    known = set(own)  # and, in a file, what the scripts beside this one know
    for path in glob.glob(os.path.join(os.path.dirname(os.path.abspath(script)), '*.py')):
        try:
            known |= {name for name, _, _ in options(path) if name}
        except (ValueError, SyntaxError, OSError):  # somebody's own script, with a default that is no literal
            pass
    config, given = dict(own), {}

    def unknown(name, where, names):
        close = difflib.get_close_matches(name, names, n=1)
        hint = f'did you mean {close[0]}?' if close else f'see python {os.path.basename(script)} --help'
        fail(f'{where}: there is no option {name!r}; {hint}')

    args, wants_help = list(argv), False
    while args:
        arg = args.pop(0)
        if arg in ('--help', '-h'):
            wants_help = True
        elif arg.startswith('--'):
            name, equals, text = arg[2:].partition('=')
            if name not in own:
                unknown(name, 'command line', own)
            if not equals and (not args or args[0].startswith('--')):
                fail(f'command line: --{name} has no value; write --{name}=VALUE ({kind(own[name])})')
            text = text if equals else args.pop(0)
            try:
                given[name] = parsed(text, own[name])
            except (ValueError, KeyError, OverflowError):
                fail(f'command line: --{name}={text} found, {kind(own[name])} wanted')
        elif not arg.endswith('.py'):
            fail(f'command line: {arg!r} is neither --option=value nor a config file (*.py)')
        elif not os.path.isfile(arg):
            fail(f'command line: there is no config file {arg}')
        else:
            try:
                values = runpy.run_path(arg)
            except Exception as e:  # the file is a program: whatever stops it, the user hears of it in one line
                lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == arg]
                fail(f'{arg}: line {getattr(e, "lineno", None) or (lines or ["?"])[-1]}: {type(e).__name__}: {getattr(e, "msg", e)}')
            for name, value in values.items():
                if name.startswith('_') or isinstance(value, (types.ModuleType, types.FunctionType)):
                    continue
                if name not in known:
                    unknown(name, arg, known)
                if name in own:
                    try:
                        config[name] = checked(value, own[name])
                    except (ValueError, OverflowError):
                        fail(f'{arg}: {name} = {value!r} found, {kind(own[name])} wanted')
    config.update(given)
    if wants_help:
        print((ast.get_docstring(ast.parse(open(script, encoding='utf-8').read())) or '').strip() + '\n\noptions (current values)')
        for name, _, comment in rows:
            print(f'  --{name}={config[name]!r:<24} {comment}' if name else f'\n  {comment}')
        sys.exit(0)
    return config
