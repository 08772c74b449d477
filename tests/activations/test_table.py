import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_persona.activations.dialogues import Dialogue
from sae_persona.activations.texts import read_texts
from sae_persona.errors import DataError


def written(folder, text):
    path = folder / "labels.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_columns_become_what_a_row_says(tmp_path):
    text = (
        "\ufeffid,text,pirate,label:weight,domain,weight,weight:pirate,covariate:age,hard,#note\n"
        'a,"ahoy,\nmatey",1,,sea,0.5,,3,,x\n'
        "b,hello,0,1,,,0.25,,1,\n"
        "c,just a text,,,,,,,,\n"
    )
    first, second, third = read_texts(written(tmp_path, text))
    assert (first.text, first.labels, first.weights) == ("ahoy,\nmatey", {"pirate": 1.0}, {"pirate": 0.5})
    assert (first.id, first.domain, first.covariates, first.hard) == ("a", "sea", {"age": 3.0}, False)
    assert (second.labels, second.weights, second.hard) == ({"pirate": 0.0, "weight": 1.0}, {"pirate": 0.25}, True)
    assert third == "just a text"


def test_prompts_and_answers_become_chats(tmp_path):
    (chat,) = read_texts(written(tmp_path, "prompt,answer,system,rude,split\nhi,go away,be rude,1,held_out\n"))
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    assert chat.labels == {"rude": 1.0} and chat.split == "held_out"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,rude\na,1\n", "labels.csv has columns id, rude: it needs text, or prompt and answer"),
        ("text,a,a\nx,1,1\n", "labels.csv has two columns named 'a'"),
        ("text,rude\nx,1\ny\n", "labels.csv:3 has 1 cells, the header 2"),
        ("text,rude\nx,very\n", "labels.csv:2: column 'rude' is taken for a label or number, and 'very' is none"),
        ("text,rude\n,1\n", "labels.csv:2 has no text"),
        ('text,rude\n"x"y,1\n', "labels.csv:2 is not CSV"),
        ("text,rude\nx,inf\n", "labels.csv:2: labels read"),
        ("text,rude,split\nx,1,test\n", "labels.csv:2: split is train or held_out"),
        (b"text\n\xff\xfe", "labels.csv is not UTF-8 text"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        list(read_texts(written(tmp_path, text)))
    assert "\n" not in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(body=st.text(alphabet=st.sampled_from(list('text,labe:01.5"\n\r\t\0é#')), max_size=40))
def test_rubbish_is_rows_or_one_line(tmp_path_factory, body):
    path = written(tmp_path_factory.getbasetemp(), "text,a\n" + body)
    try:
        assert all(isinstance(row, str | Dialogue) for row in read_texts(path))
    except DataError as error:
        assert "labels.csv" in str(error) and "\n" not in str(error)
