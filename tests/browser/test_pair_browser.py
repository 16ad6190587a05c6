"""The page with all pairs of a round in Chromium, opened from disk as a person does."""

import pytest
import tinyrun
from commandline import process

ATTACK = '<script>document.title="pwned"</script><img src=x onerror="document.title=1"></script>\u2028'

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browsed")
    rows = tinyrun.pairs(32)
    for row in rows:
        row["chosen"][0]["content"] += ATTACK
        row["prompt"][0]["content"] += ATTACK
    tinyrun.write_rows(folder / "pairs.jsonl", rows)
    tinyrun.work(tinyrun.config(folder, limits={"rounds": 2}), folder / "store")
    process("report", "tiny", "--store", folder / "store", "--out", folder / "report", check=True)
    return folder / "report"


@pytest.mark.parametrize("width", [390, 1200])
def test_no_page_is_wider_than_the_screen(chromium, report, width):
    page = chromium.new_page(viewport={"width": width, "height": 800})
    pages = sorted(report.rglob("*.html"))
    assert {"index.html", "answers.html", "round-001.html", "pairs.html"} <= {path.name for path in pages}
    for path in pages:
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
    page.close()


def test_pairs_are_found_sorted_and_read(chromium, report):
    page = chromium.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.goto((report / "index.html").as_uri())
    page.locator('a[href="round-001/pairs.html"]').first.click()
    page.locator(".row").first.wait_for()
    total = int(page.inner_text("#count").split()[0])

    page.select_option("#kept", "0")
    dropped = page.inner_text("#count").split()[0]
    assert 0 < int(dropped) < total and set(page.locator(".row > :first-child").all_inner_texts()) == {
        "dropped"
    }
    page.select_option("#kept", "")
    page.fill("#search", "question 7:")
    assert page.inner_text("#count").startswith("1 of")

    page.locator(".row").first.click()
    page.locator("#pair pre").first.wait_for()
    read = page.inner_text("#pair")
    assert "Question 7:" in read and '<script>document.title="pwned"</script>' in read
    assert page.title() == "Pairs of round 1" and not page.locator("#pair img, #pair script").count()

    page.fill("#search", "")
    page.locator('[data-by="margin"]').click()  # it was by margin, largest first
    margins = page.locator(".row > :nth-child(4)").all_inner_texts()
    numbers = [float(margin) for margin in margins if margin != "–"]
    assert numbers == sorted(numbers) and len(set(numbers)) > 3

    page.reload()  # the address names the pair
    page.locator("#pair pre").first.wait_for()
    assert "Question 7:" in page.inner_text("#pair") and not problems
    page.close()


def test_a_report_without_its_texts_says_so(chromium, report):
    for path in (report / "round-000").glob("texts-*.js"):
        path.unlink()
    page = chromium.new_page()
    page.goto((report / "round-000/pairs.html").as_uri())
    page.locator(".row").first.click()
    page.locator("#pair", has_text="is missing: copy the whole report folder").wait_for()
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_answers_are_read_round_beside_round_in_the_reader_s_colours(chromium, report, scheme):
    page = chromium.new_page(color_scheme=scheme)
    page.goto((report / "index.html").as_uri())
    page.locator('a[href="answers.html"]').click()
    first = page.locator("details").first
    assert first.locator("section h3").all_inner_texts() == ["Round 0", "Round 1"]
    assert first.locator("section pre").first.is_visible() and not page.locator("script, img").count()
    paper, ink = (
        page.evaluate(f"getComputedStyle(document.body)['{name}']") for name in ("background", "color")
    )
    light = [
        sum(map(int, colour.split("(")[1].split(")")[0].split(",")[:3])) > 382 for colour in (paper, ink)
    ]
    assert light == ([True, False] if scheme == "light" else [False, True])
    page.close()
