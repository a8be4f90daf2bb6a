// The browser's part of accessibility.py: reads a job from stdin, checks its pages, and writes the findings to stdout.
// {"packages": "…/node_modules", "browsers": {"chromium": "/usr/bin/chromium"}, "widths": [390], "schemes": ["light"],
//  "pages": [{"name": "demo", "url": "http://…", "image": "image.png", "controls": true}]}

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { text } from "node:stream/consumers";

const job = JSON.parse(await text(process.stdin));
const require = createRequire(`${job.packages}/`);
const puppeteer = require("puppeteer-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const HEIGHT = 800;
const FIREFOX_SCHEME = "layout.css.prefers-color-scheme.content-override"; // 0 is dark, 1 is light

// What Tab stops at, each in one word or two; undefined at the end of the page.
const FOCUSED = `(() => {
  const element = document.activeElement;
  if (!element || element === document.body || element === document.documentElement) return null;
  const all = [...document.querySelectorAll("*")];
  const shown = element.classList.contains("visually-hidden") ? element.nextElementSibling : element;
  const style = getComputedStyle(shown);
  const box = shown.getBoundingClientRect();
  const name = element.getAttribute("aria-label") || element.labels?.[element.labels.length - 1]?.textContent ||
    element.textContent || element.placeholder || element.className;
  return {
    index: all.indexOf(element),
    name: (element.localName + " " + name.trim().replace(/\\s+/g, " ")).slice(0, 60),
    outline: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1,
    visible: box.width > 0 && box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth,
  };
})()`;

// What Tab has to stop at. Of a group of radio buttons, the checked one.
const CONTROLS = `(() => {
  const all = [...document.querySelectorAll("*")];
  const isControl = (element) =>
    element.matches("a[href], button, input, select, textarea, summary, [tabindex='0']") && !element.disabled &&
    element.checkVisibility() && !(element.type === "radio" && !element.checked);
  return all.flatMap((element, index) => isControl(element) ? [{ index, html: element.outerHTML.slice(0, 120) }] : []);
})()`;

const LAYOUT = `(() => {
  const overflow = document.scrollingElement.scrollWidth - document.documentElement.clientWidth;
  return overflow > 0 ? ["the page is " + overflow + " px wider than the window"] : [];
})()`;

const LOADED = `document.querySelectorAll("#bundles tr").length > 0`;
const ANSWERED = `/\\d %$/.test(document.getElementById("lead").textContent)`;

// page.waitForFunction is stopped by the pages' security policy in Firefox.
async function until(page, condition) {
  for (let i = 0; i < 600; i++) {
    if (await page.evaluate(condition)) return;
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
  throw new Error(`two minutes have passed without: ${condition}`);
}

async function violations(page) {
  await page.evaluate(axe);
  const found = await page.evaluate(`axe.run(document, { resultTypes: ["violations"] })`);
  return found.violations.flatMap(({ id, help, nodes }) => nodes.map(({ html }) => `${id}: ${help}: ${html.slice(0, 120)}`));
}

// Press Tab through the whole page, and report what is not reached, or does not show that it has the focus.
async function walk(page) {
  const controls = await page.evaluate(CONTROLS);
  const stops = [];
  for (let i = 0; i < controls.length + 10; i++) {
    await page.keyboard.press("Tab");
    const stop = await page.evaluate(FOCUSED);
    if (stop && stops.some(({ index }) => index === stop.index)) break; // once around
    if (stop) stops.push(stop);
  }
  const problems = [];
  for (const { index, html } of controls) {
    if (!stops.some((stop) => stop.index === index)) problems.push(`Tab does not reach ${html}`);
  }
  for (const { name, outline, visible } of stops) {
    if (!outline) problems.push(`no outline on ${name}`);
    if (!visible) problems.push(`outside the window when focused: ${name}`);
  }
  return { stops: stops.map(({ name }) => name), problems };
}

// Use every control of the demo's page by keys alone.
async function operate(page, { image }) {
  const problems = [];
  const expect = (truth, complaint) => truth || problems.push(complaint);
  // By Tab, or Shift+Tab to what lies before: past the end of the page, Firefox would go on in its own window.
  const focus = async (selector) => {
    for (let i = 0; i < 80; i++) {
      const way = await page.evaluate((wanted) => {
        const focused = document.activeElement ?? document.body;
        if (focused.matches(wanted)) return "here";
        const target = document.querySelector(wanted);
        return focused.compareDocumentPosition(target) & Node.DOCUMENT_POSITION_PRECEDING ? "before" : "after";
      }, selector);
      if (way === "here") return;
      if (way === "before") await page.keyboard.down("Shift");
      await page.keyboard.press("Tab");
      if (way === "before") await page.keyboard.up("Shift");
    }
    throw new Error(`Tab does not reach ${selector}`);
  };
  const count = () => page.evaluate(() => document.querySelectorAll("#labels li").length);
  const isFocused = (selector) => page.evaluate((wanted) => Boolean(document.activeElement?.matches(wanted)), selector);

  for (const input of ["#file", "#folder"]) {
    // The dialog belongs to the browser: it is enough that the key opens it.
    await page.evaluate((wanted) => {
      const open = (event) => { event.preventDefault(); window.opened = wanted; };
      document.querySelector(wanted).addEventListener("click", open, { once: true });
    }, input);
    await focus(input);
    await page.keyboard.press(" ");
    expect((await page.evaluate(() => window.opened)) === input, `Space does not open the dialog of ${input}`);
  }
  await (await page.$("#file")).uploadFile(image, image);
  await until(page, ANSWERED);
  await focus("#next");
  await page.keyboard.press("Enter");
  await until(page, `document.getElementById("position").textContent.startsWith("2 ")`);
  await new Promise((resolve) => setTimeout(resolve, 3000)); // its answer, which would replace what is said of the camera
  await focus("#camera");
  await page.keyboard.press(" "); // there is no camera: the page has to say so
  await until(page, `document.getElementById("error").textContent !== ""`);

  if (await page.evaluate(() => document.getElementById("bank").checked)) {
    await focus("#bank");
    await page.keyboard.press(" ");
  }
  await focus("#new");
  const before = await count();
  await page.keyboard.type("a red bicycle");
  await page.keyboard.press("Enter");
  expect((await count()) === before + 1, "Enter does not add the label that was typed");
  expect(await isFocused("#new"), "after Enter, the field for the next label has lost the focus");
  await page.keyboard.type("a blue bicycle");
  await page.keyboard.press("Tab");
  // The page acts when the key has done its work, which takes a busy machine a moment.
  await until(page, `document.querySelectorAll("#labels > li").length === ${before + 2}`);
  expect(await isFocused("#clear"), "Tab from the new label does not lead to the button that removes all");
  await focus("#labels .remove");
  await page.keyboard.press(" ");
  expect((await count()) === before + 1, "Space on × does not remove the label");
  expect(await isFocused("#labels .remove"), "after a label is removed, its list has lost the focus");
  if ((await page.evaluate(() => document.querySelectorAll("#bundles input").length)) > 1) {
    await focus("#bundles input");
    await page.keyboard.press("ArrowDown");
    expect(await page.evaluate(() => document.querySelectorAll("#bundles input")[1].checked), "↓ selects no model");
  }
  await until(page, ANSWERED);
  return problems;
}

// Firefox does not know the orientation of the screen, which page.setViewport sets after the size.
async function resize(page, width) {
  await page.setViewport({ width, height: HEIGHT }).catch((error) => {
    if (!error.stack.includes("ScreenOrientation")) throw error;
  });
  await until(page, `innerWidth === ${width}`);
}

async function open(browser, { url, image, controls, width, scheme, name }) {
  const page = await browser.newPage();
  page.setDefaultTimeout(60_000);
  await resize(page, width);
  if (name === "chromium") await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  await page.goto(url);
  await page.evaluate(() => localStorage.clear());
  await page.reload();
  if (controls) {
    await until(page, LOADED);
    const input = await page.$("#file");
    await input.uploadFile(image, image);
    await until(page, ANSWERED);
  }
  const dark = await page.evaluate(() => matchMedia("(prefers-color-scheme: dark)").matches);
  if (dark !== (scheme === "dark")) throw new Error(`${name} does not show the ${scheme} scheme`);
  return page;
}

async function check(browser, view) {
  const page = await open(browser, view);
  const problems = [...(await violations(page)), ...(await page.evaluate(LAYOUT))];
  const walked = await walk(page);
  problems.push(...walked.problems);
  await page.close();
  if (view.controls) {
    const fresh = await open(browser, { ...view, controls: false });
    await until(fresh, LOADED);
    problems.push(...(await operate(fresh, view).catch((error) => [String(error)])));
    await fresh.close();
  }
  return { stops: walked.stops, problems };
}

const results = [];
for (const [name, executablePath] of Object.entries(job.browsers)) {
  for (const scheme of job.schemes) {
    const options = name === "firefox"
      ? { browser: "firefox", args: ["--width=1600", "--height=1000"], extraPrefsFirefox: { [FIREFOX_SCHEME]: scheme === "dark" ? 0 : 1 } }
      : { browser: "chrome", args: ["--no-sandbox", "--disable-gpu"] };
    const common = { executablePath, headless: true, defaultViewport: null, timeout: 180_000 }; // on a busy machine
    const browser = await puppeteer.launch({ ...options, ...common });
    const version = await browser.version();
    try {
      for (const described of job.pages) {
        for (const width of job.widths) {
          const view = { ...described, width, scheme, name }; // name: of the browser
          const { stops, problems } = await check(browser, view).catch((error) => ({ stops: [], problems: [String(error)] }));
          results.push({ page: described.name, browser: name, version, width, scheme, stops, problems });
          const place = `${described.name}, ${version}, ${width} px, ${scheme}`;
          process.stderr.write(`${place}: ${problems.map((problem) => `\n  ${problem}`).join("") || "no problem"}\n`);
        }
      }
    } finally {
      await browser.close();
    }
  }
}
process.stdout.write(JSON.stringify(results));
