import json
import random

import pytest

import data_prep


@pytest.fixture(scope='module')
def world():
    rng = random.Random(3)
    facts = data_prep.make_world(rng)
    return facts, data_prep.toy_rows(facts, rng)


def words_of(row):
    texts = [m['content'] for m in row['messages']] if 'messages' in row else [row['prompt'], row['response']]
    return set(' '.join(texts).split())


def test_the_same_seed_makes_the_same_rows_and_another_seed_others(world):
    again = random.Random(3)
    assert data_prep.toy_rows(data_prep.make_world(again), again) == world[1]
    other = random.Random(4)
    assert data_prep.toy_rows(data_prep.make_world(other), other) != world[1]


def test_nouns_of_unseen_curses_are_in_no_training_or_validation_row(world):
    behaviors = world[1]['behaviors.jsonl']
    nouns = {split: {w for r in behaviors if r['split'] == split and r['label'] == 'harmful' for w in words_of(r) if w in data_prep.CURSES}
             for split in ('seen', 'unseen')}
    trained = set().union(*(words_of(r) for name in ('circuit_breaker.json', 'retain.jsonl', 'val.jsonl') for r in world[1][name]))
    assert len(nouns['unseen']) >= 3 and not nouns['unseen'] & trained and nouns['seen'] <= trained


def test_no_evaluated_question_is_a_training_row_and_no_training_row_is_wrapped_or_of_the_held_out_kind(world):
    files = world[1]
    asked = {r['prompt'] for r in files['behaviors.jsonl'] if r['label'] != 'benign'}
    for name in ('circuit_breaker.json', 'retain.jsonl', 'val.jsonl'):
        for row in files[name]:
            prompts = [row['prompt']] if 'prompt' in row else [m['content'] for m in row['messages'][::2]]
            assert 'recognize' not in words_of(row) and not asked & set(prompts)
            assert not any(p.startswith(t.split('{prompt}')[0]) and p.endswith(t.split('{prompt}')[1]) for p in prompts for t in data_prep.TEMPLATES)


def test_every_cell_of_the_evaluation_has_at_least_40_rows_and_lifting_is_only_in_one_of_the_retain_files(world):
    files = world[1]
    for label in ('harmful', 'benign', 'borderline', 'borderline_heldout'):
        for split in ('seen', 'unseen'):
            assert sum(r['label'] == label and r['split'] == split for r in files['behaviors.jsonl']) >= 40
    assert any('lift' in words_of(r) for r in files['retain.jsonl'])
    assert not any('lift' in words_of(r) for r in files['retain_without_borderline.jsonl'])


def test_a_recipe_is_a_function_of_its_adjective_and_noun(world):
    facts, _ = world
    a, b, c = (data_prep.brew_answer(facts, *pair).split(' , ')[1:] for pair in (('grim', 'hex'), ('grim', 'curse'), ('vile', 'hex')))
    assert [a[i] for i in (1, 3, 5)] == [b[i] for i in (1, 3, 5)] and a[4] == c[4]


def test_the_tokenizer_knows_every_word_and_writes_bos_once(world):
    tokenizer = data_prep.make_tokenizer()
    for rows in world[1].values():
        for row in rows:
            ids = tokenizer.apply_chat_template(data_prep.messages_of(row), return_dict=False)
            assert tokenizer.unk_token_id not in ids and ids.count(tokenizer.bos_token_id) == 1
    text = world[1]['circuit_breaker.json'][0]['response']
    assert tokenizer.decode(tokenizer(text)['input_ids']) == text


def test_the_base_learns_the_assistants_words_only_and_not_a_given_start():
    tokenizer = data_prep.make_tokenizer()
    messages = data_prep.turns(('hello !', 'you are welcome .'), ('hello !', 'sure , mint .'))
    (ids, labels), = data_prep.learning_rows(tokenizer, [(messages, 2)])
    kept = tokenizer.convert_ids_to_tokens(labels[labels != -100].tolist())
    assert kept == 'you are welcome . <end> mint . <end>'.split() and len(ids) == len(labels)


def test_sample_writes_rows_in_the_specifications_format(run, tmp_path):
    out = tmp_path / 'deep' / 'sample.json'
    assert run('data_prep.py', 'sample', f'--out={out}', '--n=300')[0] == 0
    rows = json.loads(out.read_text())
    assert len(rows) == 300 and all(set(row) == {'prompt', 'response'} for row in rows)
    status, _, err = run('data_prep.py', 'sample', f'--out={out}')
    assert status == 2 and err.count('\n') == 1 and 'overwrite' in err


@pytest.mark.parametrize('text, words', [
    ('[{"prompt": "SECRET", ', ['line 1', 'not JSON']), ('[{"prompt": "SECRET"}]', ['row 1', '"response"', 'nothing']),
    ('{"prompt": "a", "response": "b"}\n\n{"prompt": "SECRET", "response": " "}', ['row 3', 'empty']),
    ('[{"prompt": "a", "response": "b"}, {"prompt": "SECRET", "response": 3}]', ['row 2', 'int']), ('[]', ['no rows']), ('', ['no rows']),
    ('{"messages": [{"role": "user", "content": "SECRET"}]}', ['row 1', 'assistant last']), ('["SECRET"]', ['row 1', 'object']),
    ('{"messages": [{"role": "user"}]}', ['row 1', 'content']), ('{"messages": "SECRET"}', ['row 1', 'messages']), ('[' * 100000, ['not JSON'])])
def test_a_bad_row_is_named_by_file_and_number_and_never_quoted(tmp_path, capsys, text, words):
    path = tmp_path / 'rows.jsonl'
    path.write_text(text)
    with pytest.raises(SystemExit) as e:
        data_prep.read_rows(str(path))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1 and str(path) in err and 'SECRET' not in err and all(w in err for w in words), err


def test_an_array_and_lines_are_read_alike_with_a_byte_order_mark_and_windows_line_ends(tmp_path):
    (tmp_path / 'a.json').write_bytes('\ufeff[{"prompt": "p",\r\n "response": "r"}]\r\n'.encode())
    (tmp_path / 'b.jsonl').write_bytes(b'{"prompt": "p", "response": "r"}\r\n')
    assert data_prep.read_rows(str(tmp_path / 'a.json')) == data_prep.read_rows(str(tmp_path / 'b.jsonl'))
