"""Passages cut from Python's own help."""

from pydoc_data.topics import topics

from flashvec.bench.passages import MAX_WORDS, MIN_WORDS, SHORTEST, cut_passages, is_prose, paragraphs

PROSE = "This sentence has exactly ten words, no more than that. "


def test_lengths_are_as_promised():
    passages = cut_passages(topics)
    assert len(passages) > 300
    for i, passage in enumerate(passages):
        is_last = i + 1 == len(passages) or passages[i + 1].topic != passage.topic
        assert (SHORTEST if is_last else MIN_WORDS) <= len(passage.text.split()) <= MAX_WORDS, passage


def test_no_passage_twice_and_all_by_topic():
    passages = cut_passages(topics)
    assert len({p.text for p in passages}) == len(passages)
    assert [p.topic for p in passages] == sorted(p.topic for p in passages)


def test_limit_keeps_the_first_of_each_topic():
    full, cut = cut_passages(topics), cut_passages(topics, 2)
    for topic in {p.topic for p in full}:
        assert [p for p in cut if p.topic == topic] == [p for p in full if p.topic == topic][:2]


def test_shared_paragraph_belongs_to_the_shorter_topic():
    small, large = PROSE * 7, PROSE * 7 + "\n\n" + "Another sentence that only the large topic has in it. " * 7
    passages = cut_passages({"large": large, "small": small})
    assert [(p.topic, p.text[:7]) for p in passages] == [("large", "Another"), ("small", "This se")]


def test_grammar_code_tables_and_headings_are_left_out():
    text = """The "lambda" expression
***********************

   lambda_expr ::= "lambda" [parameter_list] ":" expression

A lambda makes a function that has no name at all.

   def <lambda>(parameters):
       return expression

   >>> (lambda x: x + 1)(2)
   3

| "x < y" | less than | "x <= y" | less or equal |
+---------+-----------+----------+---------------+
"""
    assert list(paragraphs(text)) == ["A lambda makes a function that has no name at all."]


def test_signature_stays_with_what_it_defines():
    text = "str.lower()\n\n   Return a copy with all the characters in lower case.\n\nThat is all there is to say here."
    found = list(paragraphs(text))
    assert found == [
        "str.lower(): Return a copy with all the characters in lower case.",
        "That is all there is to say here.",
    ]


def test_long_paragraph_is_cut_at_sentences():
    passages = cut_passages({"long": PROSE * 40})
    assert len(passages) == 3 and all(p.text.endswith(".") for p in passages)
    assert " ".join(p.text for p in passages) == (PROSE * 40).strip()


def test_sentence_too_long_for_a_passage_is_left_out():
    endless = "word " * 200 + "end."
    assert cut_passages({"a": PROSE * 7 + "\n\n" + endless})[0].text == (PROSE * 7).strip()


def test_no_prose_gives_no_passage():
    assert cut_passages({"a": "", "b": "   x = 1", "c": "Too short to be one."}) == []


def test_is_prose():
    assert is_prose('The "if" statement is used for conditional execution:')
    assert not is_prose('if_stmt ::= "if" assignment_expression ":" suite')
    assert not is_prose("raise ValueError")
