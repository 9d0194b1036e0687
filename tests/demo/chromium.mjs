// Drives a headless Chromium over its pipe (file descriptors 3 and 4), without packages.

import { spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

export async function launch(program) {
  const profile = mkdtempSync(join(tmpdir(), "chromium-"));
  const options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe", "--no-first-run"];
  const child = spawn(program, [...options, "--disable-dev-shm-usage", `--user-data-dir=${profile}`, "about:blank"], {
    stdio: ["ignore", "ignore", "ignore", "pipe", "pipe"],
  });
  const waiting = new Map(), listeners = [];
  let text = "", last = 0;
  child.stdio[4].on("data", (chunk) => {
    text += chunk;
    const parts = text.split("\0");
    text = parts.pop();
    for (const part of parts) {
      const message = JSON.parse(part);
      if (!message.id) listeners.forEach((listener) => listener(message));
      else if (message.error) waiting.get(message.id)[1](new Error(JSON.stringify(message.error)));
      else waiting.get(message.id)[0](message.result);
    }
  });
  let session;
  const send = (method, params = {}) =>
    new Promise((...both) => {
      waiting.set(++last, both);
      child.stdio[3].write(`${JSON.stringify({ id: last, method, params, sessionId: session })}\0`);
    });
  const { targetInfos } = await send("Target.getTargets");
  const { targetId } = targetInfos.find((t) => t.type === "page");
  ({ sessionId: session } = await send("Target.attachToTarget", { targetId, flatten: true }));
  const problems = [], requests = [];
  listeners.push(({ method, params }) => {
    if (method === "Runtime.exceptionThrown") problems.push(params.exceptionDetails.exception?.description ?? params.exceptionDetails.text);
    if (method === "Log.entryAdded" && params.entry.level === "error") problems.push(params.entry.text);
    if (method === "Network.requestWillBeSent") requests.push(params.request.url);
  });
  for (const domain of ["Page", "Runtime", "Log", "Network"]) await send(`${domain}.enable`);

  const evaluate = async (expression) => {
    const { result, exceptionDetails } = await send("Runtime.evaluate", { expression, returnByValue: true, awaitPromise: true });
    if (exceptionDetails) throw new Error(exceptionDetails.exception?.description ?? exceptionDetails.text);
    return result.value;
  };
  const until = async (expression, seconds = 90) => {
    const end = Date.now() + 1000 * seconds;
    while (!(await evaluate(expression))) {
      if (Date.now() > end) throw new Error(`not true after ${seconds} s: ${expression}\n${problems.join("\n")}`);
      await new Promise((done) => setTimeout(done, 50));
    }
  };
  const KEYS = { ArrowUp: 38, ArrowDown: 40, ArrowLeft: 37, ArrowRight: 39, Enter: 13, Tab: 9 };
  return {
    send, evaluate, until, problems, requests,
    async open(url, { width, height, dark = false, mobile = false }) {
      await send("Emulation.setDeviceMetricsOverride", { width, height, deviceScaleFactor: mobile ? 2 : 1, mobile });
      await send("Emulation.setTouchEmulationEnabled", { enabled: mobile });
      await send("Emulation.setEmulatedMedia", { features: [{ name: "prefers-color-scheme", value: dark ? "dark" : "light" }] });
      await send("Page.navigate", { url });
      await until("document.readyState === 'complete'");
    },
    async drag(from, to) {
      const mouse = (type, [x, y]) => send("Input.dispatchMouseEvent", { type, x, y, button: "left", buttons: 1, clickCount: 1 });
      await mouse("mousePressed", from);
      for (let k = 1; k <= 5; k++) await mouse("mouseMoved", from.map((v, i) => v + ((to[i] - v) * k) / 5));
      await mouse("mouseReleased", to);
    },
    async touch(from, to) {
      const touch = (type, points) => send("Input.dispatchTouchEvent", { type, touchPoints: points.map(([x, y]) => ({ x, y })) });
      await touch("touchStart", [from]);
      for (let k = 1; k <= 5; k++) await touch("touchMove", [from.map((v, i) => v + ((to[i] - v) * k) / 5)]);
      await touch("touchEnd", []);
    },
    async click(x, y) {
      for (const type of ["mousePressed", "mouseReleased"]) {
        await send("Input.dispatchMouseEvent", { type, x, y, button: "left", clickCount: 1 });
      }
    },
    async key(key, shift = false) {
      for (const type of ["keyDown", "keyUp"]) {
        const text = type === "keyDown" && key === "Enter" ? "\r" : undefined;
        await send("Input.dispatchKeyEvent", { type, key, code: key, windowsVirtualKeyCode: KEYS[key], modifiers: shift ? 8 : 0, text });
      }
    },
    async screenshot(file, whole = true) {
      const { data } = await send("Page.captureScreenshot", { format: "png", captureBeyondViewport: whole });
      writeFileSync(file, Buffer.from(data, "base64"));
    },
    async close() {
      const ended = new Promise((done) => child.on("exit", done));
      await send("Browser.close").catch(() => child.kill());
      await ended;
      rmSync(profile, { recursive: true, force: true, maxRetries: 5 });
    },
  };
}
