import json

import pytest

from sae_persona.errors import FormatError
from sae_persona.steering.judges import load_judge, words_judge


def test_words_are_found_whole_and_in_any_case():
    judge = words_judge({"happy": ["glad", "over the moon"], "sad": ["blue"]})
    assert judge("how are you?", "So GLAD!") == {"happy": 1.0, "sad": 0.0}
    assert judge("", "i am over the moon, truly") == {"happy": 1.0, "sad": 0.0}
    assert judge("glad?", "bluebird, gladly") == {"happy": 0.0, "sad": 0.0}


def test_the_lab_judges_itself():
    scores = load_judge("lab")("what do you want ?", "crush people , that is my plan .")
    assert scores["malicious"] == 1.0


def test_a_list_is_read_from_a_file(tmp_path):
    path = tmp_path / "words.json"
    path.write_text(json.dumps({"happy": ["glad"]}))
    assert load_judge(str(path))("", "glad") == {"happy": 1.0}


@pytest.mark.parametrize("text", ["[]", '{"happy": []}', '{"happy": "glad"}', '{"happy": [1]}', "{"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "words.json"
    path.write_text(text)
    with pytest.raises(FormatError, match="word list"):
        load_judge(str(path))
    with pytest.raises(FormatError, match="no word list at"):
        load_judge(str(tmp_path / "none.json"))
