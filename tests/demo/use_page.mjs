// Uses a page as a reader does: with mouse, touch and keyboard, in light, dark and on a phone. Arguments: Chromium, page.
// Output: what the page shows after each step, its errors, and its requests.

import { launch } from "./chromium.mjs";

const browser = await launch(process.argv[2]);
const page = process.argv[3];
const steps = [];

/** Note what the page shows once it has drawn. */
async function note(step) {
  await browser.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))");
  const shown = await browser.evaluate(`({
    image: [...document.querySelectorAll("#thumbs input")].findIndex((e) => e.checked),
    energy: Number(document.getElementById("energy").textContent),
    cells: [...document.querySelectorAll("[role=gridcell]")].map((e) => e.getAttribute("aria-label")),
    selected: [...document.querySelectorAll("[aria-selected=true]")].map((e) => e.getAttribute("aria-label")),
    chips: [...document.querySelectorAll(".chip")].map((e) => e.getAttribute("aria-label")),
    patch: document.getElementById("patch-text").textContent,
    usage: document.getElementById("usage-text").textContent,
    config: document.getElementById("config").textContent,
    problem: document.getElementById("problem").textContent,
    background: getComputedStyle(document.body).backgroundColor,
    widths: [document.documentElement.scrollWidth, innerWidth],
    unnamed: [...document.querySelectorAll("button, input, select, canvas[role=img]")].filter((e) =>
      !(e.labels?.length || e.textContent.trim() || e.getAttribute("aria-label"))).map((e) => e.outerHTML),
  })`);
  steps.push({ step, ...shown });
}

const middle = (selector) =>
  browser.evaluate(`(() => {
    const element = document.querySelector(${JSON.stringify(selector)});
    element.scrollIntoView({ block: "center" });
    const { x, y, width, height } = element.getBoundingClientRect();
    return [x + width / 2, y + height / 2];
  })()`);
const patchSize = () =>
  browser.evaluate(`(({ width, height }) => [width, height])(document.querySelector("[role=gridcell]").getBoundingClientRect())`);
const ready = () => browser.until(`document.querySelector("#patch-text").textContent && document.querySelector("#usage-text").textContent`);
const focus = (selector) => browser.evaluate(`document.querySelector(${JSON.stringify(selector)}).focus()`);
const change = (selector, value) =>
  browser.evaluate(`(() => {
    const e = document.querySelector(${JSON.stringify(selector)});
    e.value = ${JSON.stringify(value)};
    for (const type of ["input", "change"]) e.dispatchEvent(new Event(type, { bubbles: true }));
  })()`);

try {
  await browser.open(page, { width: 1280, height: 900 });
  await ready();
  await note("start");

  const [dx, dy] = await patchSize();
  let from = await middle("#chip-0");
  await browser.drag(from, [from[0] + (from[0] > 300 ? -dx : dx), from[1]]);
  await note("mouse");
  await focus("#chip-1");
  await browser.key("ArrowUp");
  await browser.key("ArrowLeft");
  await note("keyboard");
  await browser.key("ArrowRight", true);
  await note("resized");
  await focus("[role=gridcell][tabindex='0']");
  await browser.key("ArrowLeft");
  await browser.key("Enter");
  await note("selected");
  await browser.click(...(await middle('#thumbs label:nth-child(3) input')));
  await note("image");
  await change("#masker", "released");
  await browser.until(`document.querySelector("#usage-text").textContent.includes("never used")`);
  await note("released");
  await browser.click(...(await middle("#again")));
  await note("again");
  await change("#masker", "multiblock");
  await change("#option-context_scale-smallest", 0.2);
  await change("#option-context_scale-largest", 0.2);
  await change("#option-min_keep", 20);
  await note("too much");
  await change("#masker", "run");
  await note("run");

  await browser.open(page, { width: 390, height: 800, dark: true, mobile: true });
  await ready();
  await note("phone");
  const [, down] = await patchSize();
  from = await middle("#chip-0");
  const label = `document.querySelector("#chip-0").getAttribute("aria-label")`;
  const before = await browser.evaluate(label);
  await browser.touch(from, [from[0], from[1] - 1.2 * down]);
  await browser.until(`${label} !== ${JSON.stringify(before)}`); // Chromium passes touches on when it likes
  await note("touch");
} finally {
  await browser.close();
}
console.log(JSON.stringify({ steps, problems: browser.problems, requests: browser.requests }));
