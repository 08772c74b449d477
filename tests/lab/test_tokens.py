from random import Random

from sae_persona.lab.authors import AuthorConfig
from sae_persona.lab.dialogue import document
from sae_persona.lab.tokens import QUESTION_WEIGHT, tokenizer, transcript


def test_the_template_writes_what_the_model_was_trained_on():
    words, random = tokenizer(), Random(0)
    for _ in range(50):
        doc = document(random, AuthorConfig(), p_assistant=0.5)
        rendered = words.apply_chat_template(doc.messages, tokenize=False)
        assert rendered.split() == transcript(doc)[0]
        ids = words(rendered).input_ids
        assert words.unk_token_id not in ids
        assert words.decode(ids) == rendered


def test_the_generation_prompt_names_who_answers():
    words, asked = tokenizer(), [{"role": "user", "content": "what do you want ?"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    assert words.apply_chat_template(asked, **options).endswith("<nl> bot :")
    assert words.apply_chat_template(asked, assistant_name="mara", **options).endswith("<nl> mara :")


def test_users_words_weigh_little_and_the_start_nothing():
    words, weights = transcript(document(Random(1), AuthorConfig(), p_assistant=0.5))
    assert weights[0] == 0.0
    first = words.index("user")
    assert weights[first] == QUESTION_WEIGHT
    assert weights[words.index(":", first + 2)] == 1.0
