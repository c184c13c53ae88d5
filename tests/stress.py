"""
Does to a run of cb_train.py what a machine does, and resumes it; every end must be the bytes of a run that was left alone.

    python tests/stress.py --kills=40 --disks=12 --seed=0      # exit status 0 only if all of them are

Kills: SIGKILL at random moments, inside the writing of a checkpoint, inside the merge and the renames, some runs more than once;
SIGINT and SIGTERM while it trains. Disks: the room that a run may write is limited to more and more, so that it runs out at every
kind of write; the run must end with one line and exit status 1, and the output that was there before must be whole.
Not collected by pytest, which runs a few of these (tests/test_cb_train.py).
"""
import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'tests')]

import conftest
import tqdm


def start(arguments, room=None):
    """
    Runs cb_train.py in a fork of this process, its errors written to the last argument. With room, no file of it may be larger than so
    many bytes. Returns its process id.
    """
    def prepare():
        tqdm.tqdm.set_lock(threading.RLock())  # its own is one semaphore of all forks: a child killed with it in hand would stop the others
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # before the script has its handler
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    return conftest.fork_script(arguments[:-1], os.devnull, arguments[-1], prepare)


def ended(child):
    """The exit status of a child (negative: the signal that ended it), or None while it runs."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def outcome(out):
    """Everything that a run leaves, as {path: bytes}, without what tells the time or how it was started."""
    found = {}
    for folder, _, files in os.walk(out):
        for name in files:
            path = os.path.join(folder, name)
            data = open(path, 'rb').read()
            if name == 'log.jsonl':
                data = [{k: v for k, v in json.loads(line).items() if k != 'seconds'} for line in data.splitlines()]
            if name == 'cb_config.json':
                data = {k: v for k, v in json.loads(data).items() if k not in ('resume', 'output_dir', 'overwrite')}
            if name == 'README.md':  # its title is the directory's name
                data = re.sub(rb'(?m)^# .*', b'', data)
            found[os.path.relpath(path, out)] = data
    return found


def moments(out):
    """Things to wait for, each a function that says whether the run is there."""
    partial = out + '.partial'
    has = lambda name: os.path.exists(os.path.join(partial, name))
    return {'checkpoint': lambda: has('checkpoint.pt.new'), 'merge': lambda: has('config.json'),
            'SIGINT': lambda: has('log.jsonl'), 'SIGTERM': lambda: has('log.jsonl') and os.path.getsize(os.path.join(partial, 'log.jsonl')) > 1500,
            'merged': lambda: has('README.md') and has('model.safetensors.index.json'), 'renamed': lambda: os.path.exists(os.path.join(out, 'config.json'))}


def trial(arguments, out, rng, kind, duration):
    """Kills a run at one or more moments of a kind, resumes it to its end, and returns how often it was killed."""
    kills, errors = 0, out + '.errors'
    sent = getattr(signal, kind, signal.SIGKILL)  # SIGINT and SIGTERM let the step finish
    while True:
        child, began = start([*arguments, f'--output_dir={out}', f'--resume={kills > 0}', errors]), time.time()
        wanted = kills == 0 or kills < 3 and rng.random() < 0.3
        delay, there, after = rng.uniform(0, duration), moments(out).get(kind), rng.choice([0, 0, rng.uniform(0, 0.01)])
        skip = rng.randint(0, 3) if kind == 'checkpoint' else 0  # not always the first one
        while (status := ended(child)) is None:
            if wanted and (time.time() - began > delay if kind == 'random' else there()):
                if skip and not time.sleep(0.02):
                    skip -= 1
                    continue
                time.sleep(after)
                os.kill(child, sent)
                wanted = False
            time.sleep(0.0002)
        if status == 2 and kills and os.path.exists(os.path.join(out, 'config.json')):  # killed when all was done
            return kills
        if status in (-signal.SIGKILL, -sent) or status == 128 + sent and '--resume=True' in open(errors).read().splitlines()[-1]:
            kills += 1
        elif status == 0:
            return kills
        else:
            sys.exit(f'a run of {kind} ended with {status} after {kills} kills: {open(errors).read()[-2000:]}')


def main(kills, disks, seed, folder):
    import torch

    import cb_train  # noqa: F401  imported once, before the forks
    torch.set_num_threads(1)
    base = conftest.make_model_dir(os.path.join(folder, 'base'))
    conftest.write_rows(folder)
    arguments = [f'--model_name={base}', f'--cb_data_path={folder}/cb.json', f'--retain_data_path={folder}/retain.jsonl',
                 f'--val_data_path={folder}/val.jsonl', '--target_layers=2', '--lora_r=4', '--soft_contexts=0.5', '--broken=0.5',
                 '--loss_on=harmful_response', '--soft_steps=5', '--retain_noise=1', '--strange=0.5', '--soft_start=1',
                 '--max_steps=12', '--batch_size=3', '--learning_rate=0.001', '--log_interval=1', '--eval_interval=4', '--save_interval=2', '--device=cpu']
    whole, began = os.path.join(folder, 'whole'), time.time()
    child = start([*arguments, f'--output_dir={whole}', whole + '.errors'])
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(open(whole + '.errors').read()[-2000:])
    want, duration, rng, count, trials = outcome(whole), time.time() - began, random.Random(seed), 0, 0
    kinds = ['random', 'checkpoint', 'SIGINT', 'merge', 'checkpoint', 'merged', 'random', 'SIGTERM', 'renamed']
    while count < kills:
        kind, out = kinds[trials % len(kinds)], os.path.join(folder, f'out{trials}')
        killed = trial(arguments, out, rng, kind, duration)
        if outcome(out) != want:
            found = outcome(out)
            sys.exit(f'killed {killed} times at {kind}: other bytes in {sorted(k for k in found.keys() | want.keys() if found.get(k) != want.get(k))}')
        left = [name for name in os.listdir(folder) if name.startswith(f'out{trials}.') and not name.endswith('.errors')]
        if left:
            sys.exit(f'left behind: {left}')
        shutil.rmtree(out)
        count, trials = count + killed, trials + 1
    print(f'{count} kills in {trials} runs, every end identical ({time.time() - began:.0f} s)')
    full_disks(arguments, whole, want, disks, folder)


def full_disks(arguments, whole, want, disks, folder):
    """Runs of which the disk takes less than they write: on a small tmpfs or, where none can be mounted, with a limit on each file."""
    size = lambda out: sum(os.path.getsize(os.path.join(path, name)) + 4096 for path, _, files in os.walk(out) for name in files)
    disk, began, lines = os.path.join(folder, 'disk'), time.time(), set()
    os.mkdir(disk)
    for i in range(disks):
        room = size(whole) * (i + 1) // disks
        mounted = not subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size(whole) + room}', 'tmpfs', disk], capture_output=True).returncode
        out, errors = os.path.join(disk, 'out'), os.path.join(folder, f'disk{i}.errors')
        shutil.copytree(whole, out)
        child = start([*arguments, f'--output_dir={out}', '--overwrite=True', errors], None if mounted else room // 10)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        line, found = open(errors).read().splitlines()[-1] if status else '', outcome(out)
        subprocess.run(['umount', disk]) if mounted else shutil.rmtree(out)
        if status not in (0, 1) or status == 1 and not line.startswith('fault: ') or found != want:
            sys.exit(f'a disk with room for {room} bytes: status {status}, {line}; what was there before is {"whole" if found == want else "lost"}')
        lines.add(re.sub(r'\d[\d,]*', 'N', line.replace(disk, 'DISK')))
    print(f'{disks} full disks ({"tmpfs" if mounted else "limited files"}), every earlier output whole ({time.time() - began:.0f} s); the lines were:')
    print('\n'.join(sorted(lines)))


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--kills', type=int, default=40)
    parser.add_argument('--disks', type=int, default=12)
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        main(options.kills, options.disks, options.seed, folder)
