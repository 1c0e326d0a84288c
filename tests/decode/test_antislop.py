"""Antislop: the distribution of the process, matching, repair, streaming and refusals."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokenry import InputError
from tokenry.decode import Antislop, DecodeLoop, Job, NGramBan, PhraseBan, Plugins, RegexBan, SequenceState, loop
from tokenry.decode.bans.phrases import start_tokens
from tokenry.decode.generation.monitor import held_tokens

# --- the distribution of the process, by enumeration -----------------------------------------------------------------

LETTERS = "abcd"
MATRIX = np.random.default_rng(0).dirichlet(np.ones(4) * 2, size=5)  # row: previous letter, or the start


def letters_tokenizer():
    raw = Tokenizer(models.WordLevel({c: i for i, c in enumerate(LETTERS)}, unk_token="a"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


class MarkovEngine:
    """A model with four tokens: the next depends on the last. Shows that the loop needs only forward and rollback."""

    cache = None

    def __init__(self):
        self.calls = self.tokens_processed = 0
        self.history = None

    def forward(self, tokens, mask=None):
        if self.history is None:
            self.history = [[4] for _ in tokens]
        else:
            for row, (new, ok) in enumerate(
                zip(tokens.tolist(), mask.tolist() if mask is not None else [[1]] * len(tokens))
            ):
                self.history[row] += [t for t, m in zip(new, ok) if m]
        self.calls += 1
        self.tokens_processed += tokens.numel()
        return torch.tensor(np.log(MATRIX[[h[-1] for h in self.history]]), dtype=torch.float32)

    def rollback(self, row, count):
        del self.history[row][-count:]


def exact_distribution(length, pattern):
    """Probability of every string: a node that completes the pattern is removed at its first letter."""
    distribution = Counter()

    def draw(ids, bans, mass):
        if len(ids) == length:
            distribution["".join(LETTERS[i] for i in ids)] += mass
            return
        position = len(ids)
        bans = bans[: position + 1] + (frozenset(),) * (position + 1 - len(bans))
        p = MATRIX[ids[-1] if ids else 4].copy()
        p[list(bans[position])] = 0
        for token in np.flatnonzero(p):
            share = mass * p[token] / p.sum()
            if share < 1e-12:
                continue
            new = (*ids, int(token))
            found = "".join(LETTERS[i] for i in new).find(pattern)
            if found < 0:
                draw(new, bans, share)
            else:
                again = (*bans[:found], bans[found] | {new[found]})
                draw(new[:found], again, share)

    draw((), (), 1.0)
    return distribution


def test_the_process_follows_its_exact_distribution():
    length, pattern, rows = 4, "ab", 6_000
    distribution = exact_distribution(length, pattern)
    assert abs(sum(distribution.values()) - 1) < 1e-9 and not any(pattern in text for text in distribution)
    job = Job(torch.zeros(rows, 1, dtype=torch.long), length, do_sample=True, seed=1)
    out = DecodeLoop(MarkovEngine(), job, letters_tokenizer(), Plugins(monitors=[RegexBan([pattern])])).generate()
    assert out.events
    seen = Counter(out.texts)
    assert set(seen) <= set(distribution)
    cells = [text for text in distribution if distribution[text] * rows >= 5]
    expected = np.array([distribution[t] * rows for t in cells] + [rows - sum(distribution[t] * rows for t in cells)])
    observed = np.array([seen[t] for t in cells] + [rows - sum(seen[t] for t in cells)])
    assert chisquare(observed[expected > 0], expected[expected > 0]).pvalue > 1e-3
    # and it is not the conditioned distribution, whose letters would be reweighted by the future
    plain = Counter()
    for text in distribution:
        p = np.prod([MATRIX[LETTERS.index(a) if a else 4][LETTERS.index(b)] for a, b in zip(["", *text], text)])
        plain[text] = p
    total = sum(plain.values())
    assert 0.5 * sum(abs(distribution[t] - plain[t] / total) for t in distribution) > 0.005


# --- matching ----------------------------------------------------------------------------------------------------


def feed_text(tokenizer, text, monitor, stop_at_first=True):
    """Append the tokens of `text` one by one, as the loop does; the violations in order."""
    row = SequenceState(0, [], tokenizer)
    found = []
    for token in tokenizer.encode(text, add_special_tokens=False):
        row.append(token)
        violation = monitor.check(row)
        if violation:
            found.append((violation, row))
            if stop_at_first:
                return found
        row.checked = len(row.text)
    return found


def matched(tokenizer, text, monitor):
    hits = feed_text(tokenizer, text, monitor)
    return text[slice(*hits[0][0].span)] if hits else None


@pytest.mark.parametrize("span", [None, 200])
def test_an_expression_whose_cost_has_no_bound_is_refused_on_the_text_where_it_shows(tokenizer, span):
    short, long = "a" * 10, "a" * 200
    assert matched(tokenizer, long + "!", RegexBan([r"(a+)+$"], span)) == "a"
    assert matched(tokenizer, short, RegexBan([r"(a|aa)+[bc]"], span)) is None
    with pytest.raises(InputError, match=r"\(a\|aa\)\+\[bc\].* takes more than 1 s on this text"):
        matched(tokenizer, long, RegexBan([r"(a|aa)+[bc]"], span))


@pytest.mark.parametrize(
    "text, phrases, expected",
    [
        ("It was THE Sound of rain", ["the sound of"], "THE Sound of"),
        ("a tomcat is", ["cat"], None),  # needs boundaries on both sides ...
        ("wait: --cat-- ok", ["--cat--"], "--cat--"),  # ... only where the phrase ends in a word character
        ("naïve café culture", ["café"], "café"),
        ("the air was still", ["the air was", "the air"], "the air"),  # complete first, before the longer one
        ("İstanbul was the air", ["the air"], "the air"),  # lower-casing this I changes the length
        ("nothing here", ["something"], None),
    ],
)
def test_phrases(tokenizer, text, phrases, expected):
    assert matched(tokenizer, text, PhraseBan(phrases)) == expected


def test_prefer_decides_between_phrases_completed_by_one_token(tokenizer):
    token = tokenizer.encode(" the", add_special_tokens=False)
    assert len(token) == 1
    for prefer, expected in (("longest", "phrase:x the"), ("shortest", "phrase:x ")):
        row = SequenceState(0, [], tokenizer)
        ban = PhraseBan(["x ", "x the"], prefer=prefer)
        for t in [*tokenizer.encode("x", add_special_tokens=False), *token]:
            row.checked = len(row.text)
            row.append(t)
        assert ban.check(row).rule == expected


def test_the_earliest_start_wins_and_points_at_its_token(tokenizer):
    text = "Then the sea was a whisper in the night"
    violation, row = feed_text(tokenizer, text, PhraseBan(["sea was a whisper", "a whisper"]))[0]
    assert violation.rule == "phrase:sea was a whisper"
    start = row.starts[violation.index]
    assert start <= text.index("sea") < row.starts[violation.index + 1]
    assert violation.factors[row.ids[violation.index]] == 0.0


def test_strength_is_the_factor_of_the_paper(tokenizer):
    for strength, factor in ((0.1, 0.1), (0.5, 1e-5), (1.0, 0.0)):
        violation, row = feed_text(tokenizer, "by the sea", PhraseBan(["the sea"], strength=strength))[0]
        assert violation.factors[row.ids[violation.index]] == pytest.approx(factor)


def test_start_tokens_cover_case_space_and_prefixes(tokenizer):
    found = {tokenizer.decode([t]) for t in start_tokens(tokenizer, "the sea")}
    assert {" the", " t", "t", "T"} <= found
    assert " " not in found
    assert not found & set(tokenizer.all_special_tokens)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("It was not a dream but a testament.", "not a dream but a testament"),
        ("Not only now", None),
        ("It was NOT\na dream but a bell", "NOT\na dream but a bell"),
    ],
)
def test_regexes(tokenizer, text, expected):
    hits = feed_text(tokenizer, text, RegexBan([r"\bnot\sa \w+ but a (testament|bell)"]))
    assert (text[slice(*hits[0][0].span)] if hits else None) == expected


def test_the_span_of_a_regex_is_limited(tokenizer):
    text = "begin " + "x" * 50 + " end"
    assert matched(tokenizer, text, RegexBan(["begin.*end"])) == text
    assert matched(tokenizer, text, RegexBan(["begin.*end"], max_span=20)) is None


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The sun had, then, DIPPED below the horizon", "sun had, then, DIPPED"),
        ("sunday dipped", None),
        ("the sun and the moon dipped", None),
    ],
)
def test_ngrams_skip_stop_words(tokenizer, text, expected):
    assert matched(tokenizer, text, NGramBan(["sun dipped"])) == expected


def test_longer_ngrams_win_ties(tokenizer):
    row = SequenceState(0, [], tokenizer)
    for token in tokenizer.encode("sun dipped below", add_special_tokens=False):
        row.append(token)
    assert NGramBan(["sun dipped", "sun dipped below"]).check(row) is not None
    assert NGramBan([("sun", "dipped")]).check(row).rule == "ngram:sun dipped"


# --- holding back ------------------------------------------------------------------------------------------------


def held_text(tokenizer, text, monitor):
    row = SequenceState(0, [], tokenizer)
    for token in tokenizer.encode(text, add_special_tokens=False):
        row.append(token)
    held = monitor.hold(row)
    return row.text[row.starts[len(row.ids) - held] :] if held else ""


def test_what_a_rewind_may_bring_back_to_life_is_held_too(tokenizer):
    """ "in a small" may be taken back; then "stood" may be followed by "at the" and must still be removable."""
    row = SequenceState(0, [], tokenizer)
    for token in tokenizer.encode("the keeper stood in a", add_special_tokens=False):
        row.append(token)

    def held(*phrases):
        count = held_tokens(row, [PhraseBan(phrases)])
        return row.text[row.starts[len(row.ids) - count] :].strip() if count else ""

    assert held("in a small") == "in a"
    assert held("in a small", "stood at the") == "stood in a"
    assert held("in a small", "stood at the", "keeper was") == "keeper stood in a"
    assert held("in the", "stood at the") == ""


@pytest.mark.parametrize("seed", range(8))
def test_hard_bans_never_have_to_give_up(llama, tokenizer, seed):
    phrases = ["the sea", "a", "o e", "li", "an the", "en", "er a", "ood", "e o"]
    monitors = [PhraseBan(phrases), RegexBan([r"[b-d] ?[a-z]", r"\d+\W"], max_span=8), NGramBan(["sea night", "done"])]
    out = run(llama, tokenizer, monitors, seed=seed, max_new_tokens=60)
    assert out.events and not any(e.kind == "given up" for e in out.events)
    assert not any(monitor.check(_row(tokenizer, ids)) for ids in out.new_ids for monitor in monitors)


def _row(tokenizer, ids):
    row = SequenceState(0, [], tokenizer)
    for token in ids:
        row.append(token)
    return row


def test_only_live_partial_matches_are_held_back(tokenizer):
    ban = PhraseBan(["the sound of the sea", "whisper in"])
    assert held_text(tokenizer, "nothing of the kind.", ban) == ""
    assert held_text(tokenizer, "and the sound of", ban).lstrip().startswith("the sound of")
    assert held_text(tokenizer, "bathe", ban) == ""  # inside a word
    ngrams = NGramBan(["sun dipped horizon"])
    assert held_text(tokenizer, "when the sun had then di", ngrams).lstrip().startswith("sun had")
    assert held_text(tokenizer, "when the sun rose,", ngrams) == ""
    assert held_text(tokenizer, "when the sun rose", ngrams) == " sun rose"  # "rose's" could stand between
    expression = RegexBan([r"not a \w+ but"], max_span=30)
    assert held_text(tokenizer, "it was not a dre", expression).lstrip().startswith("not a")
    assert held_text(tokenizer, "it was not the dre", expression) == ""
    assert held_text(tokenizer, "not a " + "x" * 40, expression) == ""  # longer than any match that counts
    assert RegexBan(["a.*b"]).hold(SequenceState(0, [], tokenizer)) is None


# --- in the loop -------------------------------------------------------------------------------------------------


def run(model, tokenizer, monitors, **options):
    inputs = tokenizer(["the old", "Elara walked"], return_tensors="pt", padding=True)
    return model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        custom_generate=loop,
        monitors=monitors,
        processing_class=tokenizer,
        pad_token_id=1,
        return_dict_in_generate=True,
        **{"max_new_tokens": 40, "do_sample": True, "seed": 3, **options},
    )


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_hard_bans_leave_no_match_and_soft_ones_fewer(llama, tokenizer, strength):
    phrases = ["the", "a", "o", "sea", "li", "an", "en", "e", "er"]
    banned = PhraseBan(phrases, strength=strength, force_backtrack=True)
    before = run(llama, tokenizer, [PhraseBan(phrases, strength=0)])
    after = run(llama, tokenizer, [banned])
    hits = [sum(_hits(tokenizer, text, phrases) for text in out.texts) for out in (before, after)]
    assert hits[0] > 0 and after.events
    assert hits[1] == 0 if strength == 1.0 else hits[1] < hits[0]


def _hits(tokenizer, text, phrases):
    return len(feed_text(tokenizer, text, PhraseBan(phrases), stop_at_first=False))


def test_a_soft_ban_the_model_overrides_stays(llama, tokenizer):
    """Greedy and a factor close to 1: the banned token stays the argmax and the text is kept."""
    plain = run(llama, tokenizer, [], do_sample=False)
    soft = run(llama, tokenizer, [RegexBan([r"\w"], strength=1e-6, max_span=5)], do_sample=False)
    assert torch.equal(plain.sequences, soft.sequences)
    assert soft.events and {e.kind for e in soft.events} == {"kept"}


def test_when_every_token_is_banned_the_text_is_kept(llama, tokenizer):
    out = run(llama, tokenizer, [RegexBan([r"\S"], max_span=3, max_retries=4)], max_new_tokens=5)
    assert any(e.kind == "given up" for e in out.events)
    assert all(len(text) > 0 for text in out.texts)


def test_force_backtrack_relaxes_before_it_gives_up(llama, tokenizer):
    options = dict(top_k=3, max_new_tokens=30)
    kept = run(llama, tokenizer, [RegexBan([r"\w"], max_retries=1)], **options)
    relaxed = run(llama, tokenizer, [RegexBan([r"\w"], max_retries=1, force_backtrack=True)], **options)
    given_up = [sum(e.kind == "given up" for e in out.events) for out in (kept, relaxed)]
    assert given_up[0] > given_up[1]


def test_invert_probs_favours_the_tail(llama, tokenizer):
    plain = run(llama, tokenizer, [RegexBan([r"[a-z]"])], max_new_tokens=20)
    turned = run(llama, tokenizer, [RegexBan([r"[a-z]"], invert_probs=True)], max_new_tokens=20)

    def chance(out):
        """Mean probability, before inverting, of what was drawn."""
        drawn = [dict(e.candidates).get(e.replacement[0], 0.0) for e in out.events if e.kind == "rewind"]
        return np.mean(drawn)

    assert chance(turned) < chance(plain)


def test_events_give_training_pairs(llama, tokenizer):
    out = run(llama, tokenizer, [PhraseBan(["a", "o", "e", "li"])])
    pairs = out.pairs
    assert pairs and len(pairs) == sum(e.kind == "rewind" for e in out.events)
    for pair, event in zip(pairs, [e for e in out.events if e.kind == "rewind"]):
        assert pair["rejected"] not in [token for token, _ in pair["candidates"]]
        assert pair["chosen"] == event.replacement[0] and pair["context_ids"][-1:] == event.context_ids[-1:]


def test_the_method_is_its_monitors(llama, tokenizer, tmp_path):
    file = tmp_path / "slop.txt"
    file.write_text("the sea\na whisper in\n")
    method = Antislop.from_strings([f"phrases={file}", "strength=0.5"])
    assert method.phrases == ("the sea", "a whisper in") and len(method.monitors()) == 1
    assert Antislop(phrases=["x"], strength=0).monitors() == []
    assert len(Antislop(phrases=["x"], regexes=["y"], ngrams=["z sun"]).monitors()) == 3


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Antislop(phrases=["fine", "  "]), "phrase 2 .* is empty"),
        (lambda: Antislop(phrases=[""]), "is empty"),
        (lambda: Antislop(regexes=["(unclosed"]), r"\(unclosed.* does not compile"),
        (lambda: Antislop(regexes=["a*"]), "matches the empty text"),
        (lambda: Antislop(regexes=["a" * 15_000, "b" * 6_000]), "have 21000 characters together; give at most 20000"),
        (lambda: Antislop(regexes=["(" * 5000 + "a" + ")" * 5000]), "too many groups"),
        (lambda: Antislop(ngrams=["of the"]), "no content word"),
        (lambda: Antislop(phrases=["a"], strength=1.5), r"strength=1.5 is not allowed .* \[0"),
        (lambda: PhraseBan(["a"], strength=-0.1), r"give a number in \[0, 1\]"),
        (lambda: PhraseBan(["a"], prefer="first"), "use 'longest' or 'shortest'"),
        (lambda: RegexBan(["a"], max_span=0), "max_span=0"),
        (lambda: PhraseBan(["a"], max_retries=0), "max_retries=0"),
        (lambda: Antislop(phrases="/nowhere/slop.txt"), "cannot be read"),
        (lambda: Antislop(phrase=["x"]), r"no option 'phrase'; its options are: phrases .*strength \(a number in"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_streaming_with_an_unbounded_regex_is_refused(llama, tokenizer):
    class Sink:
        def put(self, value): ...

        def end(self): ...

    with pytest.raises(InputError, match="max_span"):
        run(llama, tokenizer, [RegexBan(["a.*b"])], token_streamers=[Sink(), Sink()])


# --- special tokens are not text ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "monitor",
    [
        PhraseBan(["the sea", "done<eos>"]),
        RegexBan(["<eos>"]),
        RegexBan([r"sea ?<pad>"]),
        NGramBan(["the sea", "<eos> sea"]),
        Antislop(phrases=["<eos>"]).monitors()[0],
    ],
)
def test_a_ban_of_a_special_token_says_what_to_use(llama, tokenizer, monitor):
    with pytest.raises(InputError, match=r"special token '<(eos|pad)>', .* use suppress_tokens=\[\d\]"):
        run(llama, tokenizer, [monitor])


def test_a_special_token_as_stop_string_ends_a_row(llama, tokenizer):
    inputs = tokenizer(["the old"], return_tensors="pt")["input_ids"]
    options = dict(custom_generate=loop, max_new_tokens=30, pad_token_id=1, return_dict_in_generate=True)
    ids = llama.generate(inputs, eos_token_id=319, **options).new_ids[0]
    marked = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        additional_special_tokens=[tokenizer.convert_ids_to_tokens(ids[5])],
    )
    (mark,) = marked.all_special_tokens
    out = llama.generate(inputs, eos_token_id=319, processing_class=marked, stop=mark, **options)
    assert out.new_ids[0] == ids[: ids.index(ids[5]) + 1]
    with pytest.raises(InputError, match="give '<eos>' alone"):
        run(llama, tokenizer, [], stop=["sea<eos>"])


def test_stop_strings_need_a_tokenizer(llama):
    with pytest.raises(InputError, match="stop strings read text"):
        DecodeLoop(MarkovEngine(), Job(torch.zeros(1, 1, dtype=torch.long), 3, stop=["a"]))


def test_a_stop_string_at_the_beginning_of_a_long_token_is_seen(tokenizer):
    tokens = {"a": 0, "b" + " " * 200: 1, "c": 2}
    raw = Tokenizer(models.WordLevel(tokens, unk_token="a"))
    raw.decoder = decoders.Fuse()
    engine = MarkovEngine()
    engine.forward = lambda block, mask=None: torch.tensor([[0.0, 9.0, 0.0]])
    job = Job(torch.zeros(1, 1, dtype=torch.long), 5, stop=["b"])
    out = DecodeLoop(engine, job, PreTrainedTokenizerFast(tokenizer_object=raw)).generate()
    assert out.new_ids == [[1]]


def test_the_experiment_counts_phrases_by_other_means():
    from tokenry.evidence.antislop import pattern

    found = pattern(["a place where", "was said to"]).findall("A place\n where it Was said to be. Was said together.")
    assert found == ["A place\n where", "Was said to"]
