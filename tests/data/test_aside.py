"""Which rows are held out: the same prompt on one side, at least one row, whatever the rows and their order."""

from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_tpu.data.aside import Identity, identity, set_aside
from gemma4_tpu.data.forms import Conversation


def talk(prompt, answer):
    return identity(Conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]))


def sides(rows, fraction):
    aside = set_aside(rows, fraction)
    return [r for r, out in zip(rows, aside, strict=True) if not out], [
        r for r, out in zip(rows, aside, strict=True) if out
    ]


def test_ten_rows_can_be_divided_by_any_fraction():
    rows = [talk(f"q {n}", "a") for n in range(10)]
    for fraction in (1e-9, 0.05, 0.5, 0.999):
        train, heldout = sides(rows, fraction)
        assert train and heldout
        assert (len(heldout) == 1) == (fraction < 0.1)


def test_a_share_of_many_is_about_the_fraction():
    # A hash gives each of 2000 prompts a chance of 0.05: 100 ± 10 (one standard deviation).
    assert 60 <= len(sides([talk(f"q {n}", "a") for n in range(2000)], 0.05)[1]) <= 140


def test_conversations_with_one_opening_are_told_apart_as_a_whole(caplog):
    train, heldout = sides([talk("Hi", f"a {n}") for n in range(200)] * 2, 0.1)
    assert train and heldout
    assert not {row.whole for row in train} & {row.whole for row in heldout}
    assert "rows with the same prompt are on both sides" in caplog.text


def test_one_opening_of_most_rows_is_not_held_out():
    for other in range(50):
        train, heldout = sides([talk("Hi", f"a {n}") for n in range(9)] + [talk(f"q {other}", "a")], 0.3)
        assert len(heldout) == 1 and len(train) == 9


def test_rows_that_are_all_the_same_are_told_apart_with_a_warning(caplog):
    assert list(map(len, sides([talk("Hi", "a")] * 3, 0.05))) == [2, 1]
    assert "the same row is on both sides" in caplog.text
    assert set_aside([talk("Hi", "a")], 0.05) == [False]
    assert set_aside([], 0.05) == []


NUMBERS = st.integers(0, 2**64 - 1)
GROUPS = st.lists(
    st.tuples(NUMBERS, st.lists(NUMBERS, min_size=1, max_size=4, unique=True)),
    min_size=2,
    max_size=12,
    unique_by=lambda group: group[0],
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(GROUPS, st.floats(0.001, 0.999), st.randoms())
def test_the_same_rows_in_any_order(groups, fraction, random):
    rows = [Identity(prompt, whole) for prompt, wholes in groups for whole in wholes]
    train, heldout = sides(rows, fraction)
    assert train and heldout
    shuffled = random.sample(rows, len(rows))
    assert set(sides(shuffled, fraction)[1]) == set(heldout)
    largest = max(len(wholes) for _, wholes in groups)
    if 2 * largest <= len(rows):  # no prompt has more than half of the rows
        assert not {row.prompt for row in train} & {row.prompt for row in heldout}
