"""
Options: Python config files and --key=value, after nanoGPT; and how every script ends and writes its output folder.

    python cb_train.py config/llama3.py --max_steps=150 --target_layers 5,6 --overwrite=True

A script keeps its options, one `name = value  # comment` a line, between two lines `# -----`. The default's type
decides what is accepted. A comment may begin with a constraint, for every element of a list, and a colon:

    dropout = 0.05      # >= 0, < 1: on the adapter's input
    device = 'auto'     # auto | cpu | cuda | cuda:N | mps: N stands for digits

Config files are Python, and are executed: run only those you trust. Later files win, the command line wins over all.
A file may set options of any script beside this one.
"""
import ast
import collections
import contextlib
import difflib
import math
import operator
import os
import pathlib
import re
import runpy
import shutil
import signal
import sys
import traceback
import types

import filelock

FENCE = re.compile(r'# -{20,}\n(.*?)^# -{20,}\n', re.S | re.M)
BOUND, CHOICE = r'[<>]=? -?[\d.]+', r'[\w:.-]+'
CONSTRAINT = re.compile(rf'({BOUND}(?:, {BOUND})*|{CHOICE}(?: \| {CHOICE})+)(?:: |:?$)')  # a comment may begin with it
BOUNDS = {'>=': ('at least', operator.ge), '>': ('more than', operator.gt),
          '<=': ('at most', operator.le), '<': ('below', operator.lt)}
Option = collections.namedtuple('Option', 'name default comment')  # a heading has no name


def last_word(text):
    """Prints a program's last words on stderr; of torchrun's ranks on a machine only the first that ends prints."""
    run_folder = os.path.dirname(os.path.dirname(os.environ.get('TORCHELASTIC_ERROR_FILE', '')))  # of all ranks
    try:
        if run_folder:
            open(os.path.join(run_folder, 'last_word'), 'x').close()
    except FileExistsError:
        return
    except OSError:  # the ranks cannot agree: twice is better than not at all
        pass
    text = text.encode(errors='backslashreplace').decode()  # a path may be no Unicode
    print(text, file=sys.stderr if os.environ.get('RANK', '0') == '0' else sys.__stderr__, flush=True)


def fail(message):
    """Ends the program for a mistake of its user: one line on stderr, exit status 2."""
    last_word('error: ' + ' '.join(str(message).split()))
    sys.exit(2)


def out_of_memory(error):
    """Whether an exception, torch's or Python's own, says that a device or the machine has no memory left."""
    named = isinstance(error, MemoryError) or type(error).__name__ == 'OutOfMemoryError'
    return named or re.search("can't allocate memory|out of memory|ALLOC_FAILED", str(error)) is not None


def fault(kind, error, trace):
    """A sys.excepthook: one line for what the machine does to a run, a traceback for a bug; the exit status is 1."""
    text = str(error.args[0][0][2] if issubclass(kind, shutil.Error) else error)  # copytree gathers one error a file
    if out_of_memory(error):
        line = ('out of memory: set gradient_checkpointing=True or lower micro_batch_tokens, and go on with '
                '--resume=True; or lower max_seq_length; for cb_eval.py, eval_batch_size')
    elif issubclass(kind, OSError) or kind.__name__ == 'SafetensorError':
        full = re.search('No space|File too large|quota', text)
        line = (f'the disk {"is full" if full else "failed"}: {text}; the output that was there before is whole, and a '
                'training run goes on from its last checkpoint with --resume=True')
    elif issubclass(kind, KeyboardInterrupt):
        line = 'interrupted: the output that was there before is whole'
    elif kind.__name__.startswith('Dist') or 'gloo' in text:  # torch's DistBackendError, ..., or a RuntimeError of gloo
        line = ('lost another rank, which died or was killed: torchrun says below which; '
                f'go on from the last checkpoint with --resume=True ({text[-300:]})')
    else:
        return last_word(''.join(traceback.format_exception(kind, error, trace)).rstrip())
    rank = f'rank {os.environ["RANK"]}: ' if 'RANK' in os.environ else ''
    last_word(f'fault: {rank}' + ' '.join(line.split()))


def check_output(option, folder, marks, overwrite, resume=False):
    """
    Ends with one line if folder, folder.partial or folder.old may not be replaced, or folder cannot be made. A folder
    that is not empty is replaced only if it holds a file named in `marks`, as every one that this project writes does.
    """
    if os.path.basename(folder) in ('', '.', '..'):
        fail(f'{option}: {folder} found, the name of a new folder wanted')
    may_replace = {folder: overwrite, folder + '.partial': overwrite or resume, folder + '.old': True}
    for path, allowed in may_replace.items():
        names = [name for name in os.listdir(path) if name != 'lock'] if os.path.isdir(path) else [path]
        ours = any(mark in names for mark in marks)
        if os.path.lexists(path) and names and not (ours and allowed):
            ways = ', or add --overwrite=True to replace it' if ours else ' or move it, no run wrote it'
            ways += ', or --resume=True to go on' if 'checkpoint.pt' in names else ''
            fail(f'{option}: {path} is there already; choose another{ways}')
    parent = next(parent for parent in pathlib.Path(os.path.abspath(folder)).parents if os.path.lexists(parent))
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK | os.X_OK):
        fail(f'{option}: {parent} is no folder that can be written; choose another')


def publish(partial, folder):
    """Renames partial, which is complete, to folder. What was there goes last, by way of folder.old."""
    shutil.rmtree(folder + '.old', ignore_errors=True)
    if os.path.exists(folder):
        os.rename(folder, folder + '.old')
    os.rename(partial, folder)
    shutil.rmtree(folder + '.old', ignore_errors=True)


def catch_signals():
    """A list to which SIGINT and SIGTERM add their names from now on, so that a step can be finished."""
    names = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: names.append(signal.Signals(number).name))
    return names


def stop_at_signals():
    """From now on SIGINT and SIGTERM end the program with one line and exit status 128 + their number."""
    def stop(number, frame):
        last_word(f'{signal.Signals(number).name}: stopped; a checkpoint, if there is one, is whole: '
                  'go on with the same command and --resume=True')
        sys.exit(128 + number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def locked(option, partial):
    """The lock on folder.partial, held by one run at a time."""
    lock = filelock.FileLock(os.path.join(partial, 'lock'))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        fail(f'{option}: another run is writing {partial}; wait for it or choose another')
    return lock


def options(script):
    """[Option], the fenced block of a script line by line; [] if it has none."""
    fenced = FENCE.search(open(script, encoding='utf-8').read())
    rows = []
    for line in fenced[1].splitlines() if fenced else []:
        code, _, comment = line.partition('#')  # so a default may not hold a '#'
        name, equals, value = code.partition('=')
        rows.append(Option(name.strip(), ast.literal_eval(value.strip()) if equals else None, comment.strip()))
    return [option for option in rows if option.name or option.comment]


def kind(default):
    """The type of an option in words."""
    if isinstance(default, list):  # an empty one is of int
        return f'a list of {type((default or [0])[0]).__name__}, as 5,6 or [5,6]'
    return {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'a text'}[type(default)]


def checked(value, default):
    """A value as the type of default (1 for a float, 1e3 for an int, 0 for a bool); raises if it is none."""
    if isinstance(default, list) and isinstance(value, (list, tuple, range)):
        return [checked(element, (default or [0])[0]) for element in value]
    if isinstance(value, str):
        value.encode()  # a ValueError if it is no Unicode
    typed = type(default)(value)
    if typed != value or value in (math.inf, -math.inf) or isinstance(value, bool) and not isinstance(default, bool):
        raise ValueError
    return typed


def parsed(text, default):
    """The text behind --key= as a Python value: a text, a list, a bool or a number; ValueError if it is none."""
    if isinstance(default, str):
        return text
    if isinstance(default, list):
        parts = re.sub(r'^\[(.*)\]$', r'\1', text.strip()).split(',')
        return [parsed(part.strip(' "\''), (default or [0])[0]) for part in parts if part.strip()]
    words = {'true': True, 'false': False}
    return words[text.lower()] if text.lower() in words else float(text)


def check_constraint(name, value, comment):
    """Ends with one line if a value, or an element of it, breaks the constraint that its comment begins with."""
    constraint = CONSTRAINT.match(comment)
    if not constraint:
        return
    bounds = re.findall(r'([<>]=?) (-?[\d.]+)', constraint[1])
    choices = [] if bounds else constraint[1].split(' | ')
    words = [f'{BOUNDS[sign][0]} {limit}' for sign, limit in bounds]
    wanted = ' and '.join(words) if bounds else f'{", ".join(choices[:-1])} or {choices[-1]}'
    pattern = '|'.join(re.sub(r'\bN\b', r'\\d+', re.escape(choice)) for choice in choices)
    for element in value if isinstance(value, list) else [value]:
        in_bounds = all(BOUNDS[sign][1](element, float(limit)) for sign, limit in bounds)
        if not in_bounds or choices and not re.fullmatch(pattern, str(element)):
            fail(f'{name}{": " if isinstance(value, list) else "="}{element} found, {wanted} wanted')


def check_name(name, where, names):
    """Ends with one line, which suggests the nearest of names, unless name is one of them."""
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        fail(f'{where}: there is no option {name!r}; {f"did you mean {close[0]}?" if close else "see --help"}')


def file_options(path, defaults, known):
    """{name: value} that a config file sets of `defaults`; what else is `known` it may set for other scripts."""
    if not path.endswith('.py') or not os.path.isfile(path):
        fail(f'command line: there is no config file (*.py) {path}, and an option is --name=value')
    try:
        values = runpy.run_path(path)
    except (Exception, SystemExit) as e:  # the file is a program
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        line = getattr(e, 'lineno', None) or (lines or ['?'])[-1]
        fail(f'{path}: line {line}: {type(e).__name__}: {getattr(e, "msg", e)}')
    found = {}
    for name, value in values.items():
        if name.startswith('_') or isinstance(value, (types.ModuleType, types.FunctionType)):
            continue
        check_name(name, path, known)
        if name in defaults:
            try:
                found[name] = checked(value, defaults[name])
            except (ValueError, TypeError, OverflowError):
                fail(f'{path}: {name} = {value!r} found, {kind(defaults[name])} wanted')
    return found


def configure(script, argv):
    """{name: value}, a script's options in its order: defaults, then argv's config files, then its --key=value."""
    rows = options(script)
    defaults = {option.name: option.default for option in rows if option.name}
    known = set(defaults)
    for path in pathlib.Path(script).absolute().parent.glob('[!.]*.py'):
        with contextlib.suppress(ValueError, SyntaxError, OSError):  # somebody's own script
            known |= {option.name for option in options(path) if option.name}

    from_files, from_line, arguments, wants_help = {}, {}, list(argv), False
    while arguments:
        argument = arguments.pop(0)
        if argument in ('--help', '-h'):
            wants_help = True
        elif argument.startswith('--'):
            name, equals, text = argument[2:].partition('=')
            check_name(name, 'command line', defaults)
            if not equals and (not arguments or arguments[0].startswith('--')):
                fail(f'command line: --{name} has no value; write --{name}=VALUE ({kind(defaults[name])})')
            text = text if equals else arguments.pop(0)
            try:
                from_line[name] = checked(parsed(text, defaults[name]), defaults[name])
            except (ValueError, OverflowError):
                fail(f'command line: --{name}={text} found, {kind(defaults[name])} wanted')
        else:
            from_files |= file_options(argument, defaults, known)
    config = defaults | from_files | from_line
    if wants_help:
        doc = ast.get_docstring(ast.parse(open(script, encoding='utf-8').read())) or ''
        with contextlib.suppress(BrokenPipeError):  # as of `| head`
            print(f'{doc.strip()}\n\noptions (current values)')
            for name, _, comment in rows:
                print(f'  --{name}={config[name]!r:<24} {comment}' if name else f'\n  {comment}')
            sys.stdout.flush()
        sys.exit(0)
    for option in rows:
        if option.name:
            check_constraint(option.name, config[option.name], option.comment)
    return config
