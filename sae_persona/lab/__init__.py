"""The planted persona world: texts with known authors, a tiny language model of them, a rule-based judge."""
