"""The pages in headless Chromium."""

import copy
import threading

import numpy as np
import pytest
from browser import assert_fits, chromium, set_width
from running_server import running
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from serving.publish.publish import publish

pytestmark = pytest.mark.long

MODEL = "/v1/models/twotower"
HOSTILE = '<img src=x onerror="document.title=1">'
SECONDS = 30


@pytest.fixture(scope="module")
def sample(small_sample):
    """As in the other tests, with ids that a page must not take for HTML."""
    sample = small_sample()
    ids = [f"{HOSTILE}{row}" if row % 3 == 0 else f"item {row}" for row in range(300)]
    sample.__dict__["candidate_ids"] = ids
    sample.__dict__["query_ids"] = [f"{HOSTILE}q" if q == 4 else f"query {q}" for q in range(20)]
    return sample


@pytest.fixture(scope="module")
def server(sample, write_bundle, tmp_path_factory):
    root = tmp_path_factory.mktemp("explored")
    bundle = write_bundle(root / "bundle", sample)
    publish(bundle, root / "models", k=40)
    publish(bundle, root / "models", k=40)
    policy = "model_version_policy { all {} }"
    config = root / "models.config"
    config.write_text(f'model_config_list {{ config {{ name: "twotower" {policy} }} }}')
    with running(root / "models", config_file=str(config)) as place:
        while b"AVAILABLE" not in place.get(f"{MODEL}/versions/1").body:
            threading.Event().wait(0.05)  # ready means that one version is there
        yield place


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


class Page:
    """What a person sees of the page."""

    def __init__(self, browser, address, fragment=""):
        self.browser = browser
        browser.get("about:blank")
        browser.get(f"{address}/{fragment}")
        self.wait()

    def __getitem__(self, name):
        return self.browser.find_element(By.ID, name)

    def wait(self, name="answer"):
        """Until an answer, or something else, is there and nothing is under way."""
        busy = '[aria-busy="true"]'
        WebDriverWait(self.browser, SECONDS).until(
            lambda browser: (
                self[name].is_displayed() and not browser.find_elements(By.CSS_SELECTOR, busy)
            )
        )

    def ask(self, query, **fields):
        for name, text in {"query": query, **fields}.items():
            self[name].clear()
            self[name].send_keys(text)
        self["query"].send_keys(Keys.ENTER)
        until_asked = f"new URLSearchParams(location.hash.slice(1)).get('query') === {query!r}"
        WebDriverWait(self.browser, SECONDS).until(
            lambda browser: browser.execute_script(f"return {until_asked}")
        )
        self.wait()

    @property
    def rows(self):
        """Texts of the table: rank, candidate, score, exact rank."""
        return self.browser.execute_script(
            "return [...document.querySelectorAll('#results tr')].map("
            "row => [...row.cells].map(cell => cell.firstChild.textContent))"
        )

    @property
    def history(self):
        return self.browser.execute_script(
            "return [...document.querySelectorAll('#history li')].map("
            "item => item.firstChild.textContent)"
        )


def test_the_first_query_is_asked_at_once(browser, server, sample):
    first, *_ = server.get(f"{MODEL}:sample_queries").json["query_ids"]
    page = Page(browser, server.rest)
    assert page["query"].get_attribute("value") == first
    assert [row[1] for row in page.rows] == sample.best_ids(sample.query_ids.index(first))[:10]
    assert "version 2" in page["about"].text


def test_an_answer_beside_the_history(browser, server, sample):
    page = Page(browser, server.rest, "#query=query+1")
    assert [row[1] for row in page.rows] == sample.best_ids(1)[:10]
    assert [row[3] for row in page.rows] == [str(rank) for rank in range(1, 11)]
    scores = sample.vectors @ sample.queries[1]
    assert float(page.rows[0][2]) == pytest.approx(scores.max(), abs=1e-4)
    assert page.history == [sample.candidate_ids[row] for row in sample.seen[1]]
    for figure in ("index_time", "exact_time"):
        assert page[figure].text.endswith(" ms")
    tags = browser.find_elements(By.CSS_SELECTOR, "#results .tag")
    assert len(tags) == 10  # query 1 has seen its best 90


def test_asking_by_keyboard(browser, server, sample):
    page = Page(browser, server.rest)
    assert browser.switch_to.active_element.get_attribute("id") == "query"
    page.ask("query 7", k="3")
    assert [row[1] for row in page.rows] == sample.best_ids(7)[:3]
    assert browser.switch_to.active_element.get_attribute("id") == "query"
    reached = []
    for _ in range(7):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(browser.switch_to.active_element.text or "input")
    assert reached == [*["input"] * 5, "Ask", "Another query"]


def test_filtering_by_attributes(browser, server, sample):
    page = Page(browser, server.rest)
    browser.find_element(By.NAME, "colour").send_keys("red, nothing")
    browser.find_element(By.NAME, "weight").send_keys("to 20")
    page.ask("query 7")

    def fulfils(row):
        return row % 3 == 0 and row % 7 and row % 100 <= 80

    wanted = [sample.candidate_ids[row] for row in sample.best(7) if fulfils(row)]
    assert [row[1] for row in page.rows] == wanted[:10]
    browser.find_element(By.NAME, "weight").send_keys(" kg", Keys.ENTER)
    page.wait("message")
    assert "weight must be numbers" in page["message"].text


def test_leaving_out_the_history(browser, server, sample):
    page = Page(browser, server.rest)
    page["unseen"].click()
    page.ask("query 1 ")  # no such query: the space is part of the id
    assert "does not know" in page["message"].text
    page.ask("query 1")
    assert [row[1] for row in page.rows] == sample.best_ids(1, sample.seen[1])[:10]
    assert not page["message"].is_displayed()


def test_an_address_can_be_kept(browser, server, sample):
    page = Page(browser, server.rest, "#model=twotower&query=query+5&k=4&unseen=1")
    assert [row[1] for row in page.rows] == sample.best_ids(5, sample.seen[5])[:4]


def test_an_edited_history_and_attributes(browser, described):
    vectors, ids = described.sample.vectors, described.sample.candidate_ids

    def best(rows, more=0.0):
        scores = vectors @ (vectors[rows].sum(axis=0) + more)
        return [ids[row] for row in np.argsort(-scores, kind="stable")[:10]]

    def asked(history):
        WebDriverWait(browser, SECONDS).until(lambda _: page.history == history)
        page.wait()
        return [row[1] for row in page.rows]

    with running(described.models) as server:
        page = Page(browser, server.rest, "#query=query+3")
        stored = described.sample.seen[3].tolist()
        assert page.history == [ids[row] for row in stored]
        page["chosen"].send_keys(ids[200], Keys.ENTER)
        assert asked([ids[row] for row in [*stored, 200]]) == best([*stored, 200])
        browser.find_element(By.CSS_SELECTOR, "#history button").click()
        assert asked([ids[row] for row in [*stored[1:], 200]]) == best([*stored[1:], 200])
        assert "edited" in page["history_note"].text
        page.browser.find_element(By.NAME, "age").send_keys("50", Keys.ENTER)
        WebDriverWait(browser, SECONDS).until(
            lambda _: [row[1] for row in page.rows] == best([*stored[1:], 200], 0.5)
        )
        page.browser.find_element(By.NAME, "age").clear()
        page["stored"].click()
        assert asked([ids[row] for row in stored]) == described.sample.best_ids(3)[:10]


def test_another_version(browser, server):
    page = Page(browser, server.rest)
    versions = Select(page["version"])
    assert [option.text for option in versions.options] == ["newest", "2", "1"]
    versions.select_by_visible_text("1")
    WebDriverWait(browser, SECONDS).until(lambda _: "version 1" in page["about"].text)


def test_ids_are_never_html(browser, server, sample):
    page = Page(browser, server.rest)
    page.ask(f"{HOSTILE}q", k="40")
    shown = [row[1] for row in page.rows]
    assert shown == sample.best_ids(4)[:40]
    assert any(HOSTILE in name for name in shown)
    page.ask(HOSTILE)
    assert not browser.find_elements(By.TAG_NAME, "img")
    assert browser.title == "twotower explorer"


def test_mistakes_are_told(browser, server):
    page = Page(browser, server.rest)
    browser.execute_script("document.querySelector('#form').noValidate = true")
    page["k"].clear()
    page["k"].send_keys("0", Keys.ENTER)
    page.wait("message")
    assert "k: Input should be greater than or equal to 1" in page["message"].text
    assert not page["answer"].is_displayed()


@pytest.mark.parametrize("width", [400, 1200])
def test_pages_fit_into_the_window(browser, server, width):
    set_width(browser, width)
    page = Page(browser, server.rest)
    page.ask(f"{HOSTILE}q", k="40")
    assert_fits(browser, width)
    browser.get(f"{server.rest}/docs")
    WebDriverWait(browser, SECONDS).until(lambda _: browser.find_elements(By.TAG_NAME, "h2"))
    browser.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert_fits(browser, width)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_asks_for_a_token(browser, sample, write_bundle, tmp_path):
    plain = copy.copy(sample)
    plain.__dict__["seen"] = None
    publish(write_bundle(tmp_path / "bundle", plain), tmp_path / "models", k=40, scann=False)
    with running(tmp_path / "models", token="s3cret") as server:
        browser.get(server.rest)
        page = Page.__new__(Page)
        page.browser = browser
        page.wait("token_form")
        page["token"].send_keys("s3cret", Keys.ENTER)
        WebDriverWait(browser, SECONDS).until(lambda _: not page["token_form"].is_displayed())
        page.ask("query 3")  # there are no seen lists, so there is nothing to suggest
        assert [row[1] for row in page.rows] == sample.best_ids(3)[:10]
        assert page["index_name"].text == "default index: exact"
        assert page["agreement"].text == "–"
        page["another"].click()
        page.wait("message")
        assert "type a query" in page["message"].text


def test_the_page_of_the_api(browser, server):
    browser.get_log("browser")
    browser.get(f"{server.rest}/docs")
    WebDriverWait(browser, SECONDS).until(lambda _: browser.find_elements(By.TAG_NAME, "h2"))
    titles = [one.text for one in browser.find_elements(By.TAG_NAME, "h2")]
    assert titles == ["Operation", "Retrieval", "TensorFlow Serving"]
    [retrieve] = [
        one
        for one in browser.find_elements(By.TAG_NAME, "details")
        if one.text.startswith("POST /v1/models/{model}:retrieve")
    ]
    retrieve.find_element(By.TAG_NAME, "summary").click()
    for told in ("exclude_seen", "min_score", "minimum 1, default 10", "candidates", "429"):
        assert told in retrieve.text
    assert browser.get_log("browser") == []


def test_the_console_stays_empty(browser, server):
    browser.get_log("browser")
    Page(browser, server.rest).ask("query 9")
    assert browser.get_log("browser") == []
