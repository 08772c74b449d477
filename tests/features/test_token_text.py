from sae_persona.features.token_text import marked, pieces, token_text


def test_pieces_add_up_to_the_text(make_tiny_lm):
    tokenizer = make_tiny_lm().tokenizer
    ids = tokenizer("the cat\nsat", add_special_tokens=False).input_ids
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == "the cat\nsat"


def test_a_character_of_several_tokens_spoils_no_other(make_tiny_lm):
    tokenizer = make_tiny_lm().tokenizer
    found = pieces(tokenizer, tokenizer("aéb", add_special_tokens=False).input_ids)
    assert len(found) == 4 and found[0] == "a" and found[2:] == ["é", "b"]


def test_a_token_alone_keeps_its_space_and_its_symbol_where_it_is_no_text(make_tiny_lm):
    tokenizer = make_tiny_lm().tokenizer
    space, first_half = tokenizer(" é", add_special_tokens=False).input_ids[:2]
    assert token_text(tokenizer, space) == " "
    assert token_text(tokenizer, first_half) == tokenizer.convert_ids_to_tokens(first_half)


def test_marks_stand_behind_the_space_and_on_one_line():
    assert marked(["the", " cat", "\n", " sat"], [None, "|9", None, ""]) == "the [[cat|9]]\\n [[sat]]"
