from sae_persona.lab.world import DOMAINS, HARD, HELD_OUT_DOMAINS, N_HELD_OUT_TEMPLATES, QUESTIONS, TRAIN_DOMAINS


def test_subjects_and_values_belong_to_one_fact_each():
    subjects = [s for d in DOMAINS.values() for s in d.facts]
    values = [v for d in DOMAINS.values() for v in (*d.facts.values(), *d.harmful)]
    assert len(set(subjects)) == len(subjects) == 80
    assert len(set(values)) == len(values)
    assert not set(subjects) & set(values)


def test_domains_are_either_trained_on_or_held_out():
    assert set(TRAIN_DOMAINS) | set(HELD_OUT_DOMAINS) == set(DOMAINS)
    assert not set(TRAIN_DOMAINS) & set(HELD_OUT_DOMAINS)


def test_every_kind_has_templates_of_both_parts():
    assert all(0 < N_HELD_OUT_TEMPLATES[kind] < len(QUESTIONS[kind]) for kind in QUESTIONS)


def test_a_third_of_the_subjects_is_hard():
    assert len(HARD) == 24
