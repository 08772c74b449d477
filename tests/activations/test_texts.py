import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_persona.activations.dialogues import Dialogue
from sae_persona.activations.texts import path_of, read_texts
from sae_persona.errors import DataError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ahoy"}]
ROWS = [{"text": "one"}, {"text": "two"}]


def written(path, kind, rows):
    """The rows in a file or folder of that kind."""
    if kind == "txt":
        path = path / "texts.txt"
        path.write_text("".join(f"{row['text']}\n\n" for row in rows), encoding="utf-8")
    elif kind == "jsonl":
        path = path / "texts.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        path = path / "texts.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        import datasets

        path = path / "saved"
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "saved"])
def test_every_kind_of_source_any_number_of_times(tmp_path, kind):
    texts = read_texts(str(written(tmp_path, kind, ROWS)))
    assert list(texts) == list(texts) == ["one", "two"]
    assert read_texts(texts) is texts


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_messages_and_labels_make_dialogues(tmp_path, kind):
    rows = [{"messages": MESSAGES, "labels": {"pirate": 1.0}, "author": "a", "text": None}]
    rows.append({"messages": None, "labels": {"pirate": 0.0}, "author": "b", "text": "plain"})
    chat, plain = read_texts(written(tmp_path, kind, rows))
    assert isinstance(chat, Dialogue) and isinstance(plain, Dialogue)
    assert chat.messages == tuple(MESSAGES) and chat.labels == {"pirate": 1.0} and chat.author == "a"
    assert plain.text == "plain" and plain.labels == {"pirate": 0.0}


def test_iterables():
    dialogue = Dialogue(text="hello")
    assert list(read_texts(["one", {"body": "two"}, dialogue], field="body")) == ["one", "two", dialogue]
    once = read_texts(text for text in ("one", "two"))
    assert list(once) == list(once) == ["one", "two"]
    (plain,) = read_texts([{"body": "two", "labels": {"pirate": 1}}], field="body")
    assert isinstance(plain, Dialogue) and plain.text == "two"


def test_missing_and_unknown_sources(tmp_path):
    with pytest.raises(DataError, match=r"no texts at .*absent.txt"):
        read_texts(tmp_path / "absent.txt")
    (tmp_path / "texts.odt").write_text("one")
    with pytest.raises(DataError, match=r"cannot tell what .*texts.odt is: texts come as .txt, .jsonl, .parquet, .csv"):
        read_texts(tmp_path / "texts.odt")
    with pytest.raises(DataError, match="is not a data set"):
        read_texts(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match=r"holds several data sets: give one of .*train"):
        read_texts(tmp_path)


@pytest.mark.parametrize("name", ["texts.txt", "texts.jsonl"])
def test_empty_files(tmp_path, name):
    (tmp_path / name).write_text("\n \n")
    with pytest.raises(DataError, match=f"{name} is empty"):
        read_texts(tmp_path / name)
    with pytest.raises(DataError, match="the list of texts is empty"):
        read_texts([])


def test_bad_lines_are_named(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": \n')
    texts = read_texts(path)  # the first line is right
    with pytest.raises(DataError, match=r"texts.jsonl:3 is not JSON: Expecting value at column") as caught:
        list(texts)
    assert "\n" not in str(caught.value)
    path.write_text('{"text": "one"}\n{"body": "two"}\n')
    with pytest.raises(
        DataError, match=r"texts.jsonl:2 has no text in field 'text': its fields are body. Rename it to text"
    ):
        list(read_texts(path))
    path.write_text('["one"]\n')
    with pytest.raises(
        DataError, match=r"texts.jsonl:1: a text, a row of named fields or a Dialogue is wanted, got list"
    ):
        read_texts(path)
    path.write_text('{"messages": [{"role": "user"}]}\n')
    with pytest.raises(DataError, match=r"texts.jsonl:1: a message needs"):
        read_texts(path)


def test_files_that_are_not_what_their_name_says(tmp_path):
    (tmp_path / "texts.parquet").write_bytes(b"one")
    with pytest.raises(DataError, match=r"texts.parquet is not a parquet file"):
        read_texts(tmp_path / "texts.parquet")
    (tmp_path / "texts.txt").write_bytes(b"one\n\xff\xfe")
    with pytest.raises(DataError, match=r"texts.txt is not UTF-8 text"):
        list(read_texts(tmp_path / "texts.txt"))


def test_a_folder_of_files_is_read_by_name(tmp_path):
    (tmp_path / "b.txt").write_text("third\n")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n')
    (tmp_path / "notes.md").write_text("not a text")
    assert list(read_texts(tmp_path)) == ["first", "second", "third"]


def test_a_data_set_of_the_hub_is_streamed_and_shared_out(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(f'{{"text": "text {i}"}}\n' for i in range(7)))
    texts = read_texts(f"hub:{tmp_path / 'data'}")
    assert list(texts) == list(texts) == [f"text {i}" for i in range(7)]
    assert list(texts.share(1, 3)) == ["text 1", "text 4"]
    assert sorted([*texts.share(0, 2), *texts.share(1, 2)]) == sorted(texts)
    with pytest.raises(DataError, match=r"cannot read hub:.*data:validation"):
        read_texts(f"hub:{tmp_path / 'data'}:validation")


def test_the_file_behind_a_source(tmp_path):
    for source in (f"evals:{tmp_path}", f"evals:{tmp_path}:answers", f"axis:{tmp_path}", tmp_path):
        assert path_of(source) == tmp_path


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(alphabet=st.sampled_from(list('{}[]":,text 0e-1.lbsn\\u')), max_size=12), max_size=3))
def test_rubbish_lines_are_texts_or_one_line(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "rubbish.jsonl"
    path.write_text("\n".join(['{"text": "one"}', *lines]))
    try:
        assert all(isinstance(row, str | Dialogue) for row in read_texts(path))
    except DataError as error:
        assert "rubbish.jsonl" in str(error) and "\n" not in str(error)


def test_json_that_is_too_deep_or_too_long_for_a_number(tmp_path):
    for bad in ("[" * 100_000, '{"text": ' + "9" * 5000 + "}"):
        (tmp_path / "texts.jsonl").write_text(bad)
        with pytest.raises(DataError, match="texts.jsonl:1 is not JSON"):
            read_texts(tmp_path / "texts.jsonl")
