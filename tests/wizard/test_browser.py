"""The page in a real browser, by mouse and by keyboard, wide and narrow. Screenshots are kept for people to look at."""

import ipaddress

import pytest
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-device-scale-factor=1",
)
WIDE, NARROW = (1200, 1400), (500, 1800)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    # Named, so that no driver is looked for elsewhere.
    driver = webdriver.Chrome(service=Service("/usr/bin/chromedriver"), options=options)
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, here, served, artefacts):
    class Page:
        network = ipaddress.ip_network(here.network)

        def open(self, path="/wizard/libvirt"):
            browser.get(served + path)

        def field(self, name):
            return browser.find_element(By.NAME, name)

        def type(self, name, text):
            self.field(name).clear()
            self.field(name).send_keys(text)

        def value(self, name):
            return self.field(name).get_property("value")

        def press(self, text):
            """Clicks, and waits until another page is there."""
            self.run("window.left = true")
            browser.find_element(By.XPATH, f"//*[contains(@class, 'btn') and normalize-space() = '{text}']").click()
            there = "return !window.left && document.readyState == 'complete'"
            WebDriverWait(browser, 30, ignored_exceptions=[WebDriverException]).until(lambda _: self.run(there))

        @property
        def heading(self):
            return browser.find_element(By.TAG_NAME, "h2").text

        @property
        def active(self):
            return browser.switch_to.active_element

        def message(self, name):
            return browser.find_element(By.ID, f"{name}-error").text

        def keep(self, name):
            directory = artefacts / "wizard"
            directory.mkdir(exist_ok=True)
            browser.save_screenshot(str(directory / f"{name}.png"))

        def size(self, wide_high):
            # The window's width is not below 500 pixels in any Chromium; that of the page can be.
            width, height = wide_high
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

        def run(self, script, *arguments):
            return browser.execute_script(script, *arguments)

    page = Page()
    page.size(WIDE)
    browser.get(served + "/")
    browser.delete_all_cookies()
    page.open("/login")
    return page


def test_who_is_not_logged_in_does_not_see_the_page(page, browser, served):
    browser.delete_all_cookies()
    page.open()
    assert browser.current_url == f"{served}/login" and page.heading == "Login"


def test_the_page_is_filled_in_wrongly_corrected_left_and_come_back_to(page, here, browser):
    page.open()
    assert page.heading == "Virtual machines"
    assert page.value("ip_network") == here.network and page.value("gateway") == here.gateway
    # The installer's own bar of steps, with ours as the current one.
    assert browser.find_element(By.CSS_SELECTOR, ".steps .active").text == "2 libvirt/KVM"
    page.keep("1-offered")

    page.type("gateway", "203.0.113.1")
    page.type("ip_start", "many")
    page.type("storage_path", "vms & <more>")
    page.type("gc_grace_days", "23")
    page.press("Continue")
    assert page.heading == "Virtual machines"
    assert "outside the network" in page.message("gateway")
    assert "must be a number" in page.message("ip_start") and "absolute path" in page.message("storage_path")
    assert (page.value("gateway"), page.value("storage_path"), page.value("gc_grace_days")) == ("203.0.113.1", "vms & <more>", "23")
    assert page.active.get_attribute("name") == "gateway", "the first wrong field has the focus"
    # Beside its field: the message is the next thing below the input.
    for name in ("gateway", "ip_start", "storage_path"):
        below = page.run(
            "const i = document.getElementsByName(arguments[0])[0].getBoundingClientRect(),"
            " m = document.getElementById(arguments[0] + '-error').getBoundingClientRect();"
            " return [m.top - i.bottom, m.left - i.left]",
            name,
        )
        assert 0 <= below[0] < 20 and abs(below[1]) < 5, (name, below)
    page.keep("2-refused")

    page.type("gateway", here.gateway)
    page.type("ip_start", str(page.network[210]))
    page.type("storage_path", "/var/lib/blockhost/vms")
    page.press("Continue")
    assert page.heading == "Connectivity"

    page.open()
    assert (page.value("ip_start"), page.value("gc_grace_days")) == ("210", "23")
    page.press("Back")
    assert page.heading == "Blockchain"
    page.open("/wizard/summary")
    text = browser.find_element(By.CLASS_NAME, "summary-section").text
    assert here.network in text and "210 to 250" in text and here.bridge in text
    page.keep("3-summary")


def test_the_page_can_be_used_from_the_keyboard(page, browser, here):
    page.open()
    reached = []
    element = browser.find_element(By.TAG_NAME, "body")
    for _ in range(12):
        element.send_keys(Keys.TAB)
        element = page.active
        reached.append(element.get_attribute("name") or element.text)
        outline = page.run("return getComputedStyle(arguments[0]).outlineStyle", element)
        assert outline != "none", f"{reached[-1]} does not show that it has the focus"
        if reached[-1] == "Continue":
            break
    expected = ["ip_network", "gateway", "ip_start", "ip_end", "storage_pool", "storage_path", "gc_grace_days", "Back", "Continue"]
    # The list of bridges is there where the host has several.
    assert [name for name in reached if name != "bridge"] == expected
    page.field("gc_grace_days").send_keys(Keys.ENTER)
    WebDriverWait(browser, 30, ignored_exceptions=[WebDriverException]).until(lambda _: page.heading == "Connectivity")


def test_every_input_has_a_name_for_those_who_do_not_see_it(page, browser):
    page.open()
    page.type("gateway", "x")
    page.press("Continue")
    for element in browser.find_elements(By.CSS_SELECTOR, "form input, form select"):
        name = element.get_attribute("name")
        assert element.accessible_name == browser.find_element(By.CSS_SELECTOR, f"label[for={element.get_attribute('id')}]").text, name
        for described in element.get_attribute("aria-describedby").split():
            assert browser.find_element(By.ID, described).text, (name, described)
    assert "gateway-error" in page.field("gateway").get_attribute("aria-describedby")
    assert browser.find_element(By.CSS_SELECTOR, "[role=alert]").text.startswith("Nothing was saved yet")
    ids = page.run("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("width", [320, 500])
def test_a_narrow_window_needs_no_scrolling_sideways(page, browser, width):
    page.size((width, 2100))
    page.open()
    page.type("storage_path", "/" + "a" * 200 + "/../x")
    page.type("gateway", "203.0.113.1")
    page.press("Continue")
    assert page.run("return document.documentElement.scrollWidth") <= width
    boxes = {name: page.field(name).rect for name in ("ip_network", "gateway", "ip_start")}
    assert boxes["gateway"]["y"] > boxes["ip_network"]["y"] + boxes["ip_network"]["height"], "one column"
    for element in browser.find_elements(By.CSS_SELECTOR, "form input, form .btn"):
        assert element.rect["x"] >= 0 and element.rect["x"] + element.rect["width"] <= width
    page.keep(f"4-narrow-{width}")


def test_the_colours_can_be_told_from_the_background(page, browser):
    """4.5 to 1, as WCAG asks for text of this size, for what is ours: messages, hints, labels."""
    page.open()
    page.type("gateway", "x")
    page.press("Continue")
    ratio = """
        const channel = c => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4 };
        const light = rgb => { const [r, g, b] = rgb.match(/[0-9.]+/g).map(Number).map(c => rgb.startsWith('color(') ? c * 255 : c); return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b) };
        const e = arguments[0], a = light(getComputedStyle(e).color), b = light(getComputedStyle(e.closest('.card')).backgroundColor);
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)
    """
    for selector in (".text-error", ".message.text-muted", "label", ".alert-success"):
        assert page.run(ratio, browser.find_element(By.CSS_SELECTOR, selector)) >= 4.5, selector


def test_a_host_without_a_bridge_is_told(page, here, monkeypatch, tmp_path):
    from blockhost.provisioner_libvirt import bridge

    monkeypatch.setattr(bridge, "SYS_CLASS_NET", tmp_path)
    page.open()
    page.keep("5-no-bridge")
    assert page.value("ip_network") == ""
