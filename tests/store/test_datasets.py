"""Datasets: what is kept, what is refused and where, and that a replacement is all or nothing."""

import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_lightning.exceptions import DataUploadError
from lightning_jax import data
from lightning_jax.store import DataError, Store, UnknownError


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store.sqlite3")
    yield store
    store.close()


def lines(*tasks) -> bytes:
    return b"".join(json.dumps(task).encode() + b"\n" for task in tasks)


def test_tasks_come_back_as_uploaded(store):
    tasks = [
        {"question": "2+2?", "ground_truth": "4", "n": 2**70},
        {"question": "Größe?", "x": [1.5, None, {"y": "€"}]},
    ]
    info = store.put_dataset("d", "train", [lines(*tasks)])
    assert (info.data_id, info.split, info.num_tasks) == ("d", "train", 2)
    assert [store.task("d", "train", i) for i in range(store.num_tasks("d", "train"))] == tasks


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(min_size=0, max_size=30), min_size=1, max_size=8), st.integers(1, 9), st.booleans())
def test_pieces_do_not_matter(tmp_path_factory, questions, piece, ends_with_newline):
    store = Store(tmp_path_factory.mktemp("store") / "s")
    body = lines(*({"question": q} for q in questions))
    body = body if ends_with_newline else body[:-1]
    store.put_dataset("d", "train", (body[i : i + piece] for i in range(0, len(body), piece)))
    assert [store.task("d", "train", i)["question"] for i in range(len(questions))] == questions
    store.close()


def test_blank_lines_carriage_returns_and_a_byte_order_mark_are_no_tasks(store):
    store.put_dataset("d", "train", [b'\xef\xbb\xbf{"question": 1}\r\n\r\n  \n{"question": 2}\r\n'])
    assert [store.task("d", "train", i)["question"] for i in (0, 1)] == [1, 2]
    assert store.num_tasks("d", "train") == 2


@pytest.mark.parametrize(
    "bad, names",
    [
        (b"[1, 2]", "an array, not an object"),
        (b'"text"', "a string, not an object"),
        (b"true", "a boolean, not an object"),
        (b"null", "null, not an object"),
        (b"3", "a number, not an object"),
        (b'{"ground_truth": "4"}', "'question' is missing"),
        (b'{"question": null}', "'question' is null"),
        (b'{"question": "a"', "not valid JSON"),
        (b'{"question": NaN}', "not valid JSON: NaN"),
        (b'{"question": "a", "x": -1e999}', "not valid JSON: -1e999"),
        (b'{"question": "a', "not valid JSON: Unterminated string starting at character 14"),
        (b'{"question": ' + b"[" * 200_000, "not valid JSON.*recursion"),
        ('{"question": "a"}'.encode("utf-16"), "not valid JSON"),
        (b'{"question": "\xff"}', "not valid JSON"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_kept(store, bad, names):
    store.put_dataset("d", "train", [lines({"question": "old"})])
    many = [lines({"question": "x" * 1000})] * 9000  # enough to have been written in part
    for body, number in (([*many, bad, b"\n"], 9001), ([b"\n\n", bad], 3)):
        with pytest.raises(DataError, match=f"line {number}.*{names}") as caught:
            store.put_dataset("d", "train", body)
        assert caught.value.line == number
        assert isinstance(caught.value, DataUploadError)
        with pytest.raises(DataError):
            store.put_dataset("new", "train", body)
    assert store.num_tasks("d", "train") == 1 and store.task("d", "train", 0) == {"question": "old"}
    assert store.dataset("new") == []
    assert store._database.read("SELECT count(*) FROM tasks") == [(1,)]


def test_an_empty_file_and_an_endless_line_are_refused(store):
    with pytest.raises(DataError, match="no task"):
        store.put_dataset("d", "train", [b"\n \n"])
    with pytest.raises(DataError, match="line 2: longer than"):
        store.put_dataset("d", "train", [b'{"question": 1}\n', *[b"x" * 2**20] * 65])


def test_a_replacement_is_seen_whole_or_not_at_all(store):
    """A reader during uploads sees one version or another, never a mixture."""
    store.put_dataset("d", "train", [lines({"question": 0})])
    stop = threading.Event()
    seen = []

    def read():
        while not stop.is_set():
            seen.append(store.num_tasks("d", "train"))

    reader = threading.Thread(target=read)
    reader.start()
    for count in (3000, 10, 3000):
        store.put_dataset("d", "train", [lines({"question": i}) for i in range(count)])
    stop.set()
    reader.join()
    assert set(seen) <= {1, 3000, 10}
    assert store._database.read("SELECT count(*) FROM tasks") == [(3000,)]


def test_what_is_held_stays_whatever_becomes_of_the_dataset(tmp_path):
    store = Store(tmp_path / "s")
    for split in ("train", "test"):
        store.put_dataset("d", split, [lines({"question": f"old {split}"}, {"question": 2})])
    store.put_dataset("other", "test", [lines({"question": "other"})])
    store.hold_data("job:1", {"train": "d", "test": "other"})
    for name in ("d", "other"):
        upload = store.upload(name, "train")
        upload.feed(lines({"question": "new"}))
        store.replace_dataset(name, [upload])
    for _ in range(2):
        assert [info.split for info in store.dataset("d")] == ["train"], "replaced as a whole"
        assert store.task("d", "train", 0) == {"question": "new"}
        assert store.task("job:1", "train", 0) == {"question": "old train"} and store.num_tasks("job:1", "train") == 2
        assert store.task("job:1", "test", 0) == {"question": "other"}
        store.close()
        store = Store(tmp_path / "s")  # and after a restart
    store.hold_data("job:1", {})
    assert store.dataset("job:1") == []
    assert store._database.read("SELECT count(*) FROM tasks") == [(2,)], "what nobody holds is gone"
    with pytest.raises(UnknownError, match="no dataset 'nowhere'"):
        store.hold_data("job:2", {"train": "nowhere"})
    store.close()


def test_asking_for_one_dataset_looks_at_no_other(store, comparisons):
    name = comparisons.of(str)
    for i in range(20):
        for split in ("train", "test"):
            store.put_dataset(name(f"data-{i}"), split, [lines({"question": "?"})])
    comparisons.count = 0
    assert [info.split for info in store.dataset("data-7")] == ["test", "train"] and store.dataset("job:x") == []
    assert comparisons.count <= 4


def test_what_does_not_exist_is_an_error(store):
    store.put_dataset("d", "train", [lines({"question": 0})])
    with pytest.raises(UnknownError, match="no dataset 'd' with split 'test'"):
        store.num_tasks("d", "test")
    with pytest.raises(IndexError):
        store.task("d", "train", 1)


def test_a_half_finished_upload_is_gone_after_a_restart(tmp_path):
    store = Store(tmp_path / "s")
    upload = store.upload("d", "train")
    for _ in range(6000):
        upload.feed(lines({"question": "x" * 1000}))
    assert store._database.read("SELECT count(*) FROM tasks")[0][0] > 0
    store.close()
    store = Store(tmp_path / "s")
    assert store.dataset("d") == [] and store._database.read("SELECT count(*) FROM tasks") == [(0,)]
    store.close()


# ---- data.py ----


def indices(batches) -> list[list[int]]:
    return [[item.task_index for item in batch] for batch in batches]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 23), st.integers(1, 9), st.integers(1, 3), st.integers(0, 5), st.data())
def test_every_task_once_an_epoch_and_the_position_is_restored(tmp_path_factory, tasks, batch, epochs, seed, draw):
    store = Store(tmp_path_factory.mktemp("store") / "s")
    store.put_dataset("d", "train", [lines(*({"question": i} for i in range(tasks)))])
    whole = indices(data.task_batches(store, "d", batch, epochs, seed))
    assert len(whole) == data.num_batches(tasks, batch, epochs)
    flat = sum(whole, [])
    for epoch in range(epochs):
        assert sorted(flat[epoch * tasks : (epoch + 1) * tasks]) == list(range(tasks))
    split = draw.draw(st.integers(0, len(whole)))
    first = data.task_batches(store, "d", batch, epochs, seed)
    assert indices(next(first) for _ in range(split)) == whole[:split]
    second = data.task_batches(store, "d", batch, epochs, seed)
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert indices(second) == whole[split:]
    store.close()


def test_epochs_and_seeds_differ_in_order(store):
    store.put_dataset("d", "train", [lines(*({"question": i} for i in range(40)))])
    first, second = indices(data.task_batches(store, "d", 40, 2, 0))
    (other,) = indices(data.task_batches(store, "d", 40, 1, 1))
    assert first != second and first != other and first != list(range(40))
    item = next(data.task_batches(store, "d", 40, 1, 0))[0]
    assert item.task == {"question": item.task_index} and item.task_id == f"train-{item.task_index}"


def test_what_replacements_leave_comes_first_and_nothing_is_drawn_twice_at_once(store):
    store.put_dataset("d", "train", [lines(*({"question": i} for i in range(8)))])
    order = [i for batch in indices(data.task_batches(store, "d", 4, 2, 0)) for i in batch]
    queue = data.TaskQueue(store, "d", 4, 0)
    first = queue.batch()
    more = queue.replacements(1, first)
    assert indices([first, more]) == [order[:4], order[4:5]]
    again = data.TaskQueue(store, "d", 4, 0)
    again.set_state(json.loads(json.dumps(queue.get_state())))
    ((third,), (restored,)) = indices([queue.batch()]), indices([again.batch()])
    assert third == restored and third[:3] == order[5:8] and len(set(third)) == 4, "two epochs meet in it"


def test_tasks_that_were_drawn_and_are_gone_are_left_out(store):
    """A run that was stopped may go on with a file that has become shorter."""
    store.put_dataset("d", "train", [lines(*({"question": i} for i in range(8)))])
    queue = data.TaskQueue(store, "d", 4, 0)
    queue.replacements(1, queue.batch())
    store.put_dataset("d", "train", [lines({"question": 0}, {"question": 1})])
    again = data.TaskQueue(store, "d", 4, 0)
    again.set_state(queue.get_state())
    assert indices([again.items([7, 1, 2, 0])]) == [[1, 0]]
    for _ in range(3):
        assert {item.task_index for item in again.batch()} <= {0, 1}


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 4), st.integers(0, 5))
def test_replacements_are_as_many_as_there_are_untried_tasks(tmp_path_factory, tasks, batch, missing, seed):
    store = Store(tmp_path_factory.mktemp("store") / "s")
    store.put_dataset("d", "train", [lines(*({"question": i} for i in range(tasks)))])
    queue = data.TaskQueue(store, "d", batch, seed)
    for _ in range(20):
        step = queue.batch()
        for _ in range(2):
            untried = tasks - len(step)
            step += queue.replacements(missing, step)
            assert tasks - len(step) == max(0, untried - missing)
            assert len({item.task_index for item in step}) == len(step)
        assert len(queue.get_state()["spare"]) < 2 * (tasks + batch), "what is left does not pile up"
    store.close()
