/** Controls of a masker's options, made from their descriptions, and the options as text of a config. */

import { MASKERS } from "./maskers.js";

/** Return an element with attributes and children; "on..." are listeners, and text is a child. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const shown = (value) => (Number.isInteger(value) ? `${value}` : value.toFixed(2));

/** Return a slider with its label; `change` is called with its value while it is moved. */
function slider(id, label, { min, max, step }, value, change) {
  const output = element("output", { for: id }, shown(value));
  const input = element("input", { type: "range", id, min, max, step });
  input.value = value;
  input.addEventListener("input", () => {
    output.value = shown(input.valueAsNumber);
    change(input.valueAsNumber);
  });
  return { input, output, row: element("div", { class: "slider" }, element("label", { for: id }, label), output, input) };
}

/** Return the control of one option; `set` is called with its new value. */
function control(option, value, set) {
  const id = `option-${option.name}`;
  if (option.flag) {
    const input = element("input", { type: "checkbox", id, checked: value, onchange: () => set(input.checked) });
    return element("div", { class: "check" }, input, element("label", { for: id }, option.label));
  }
  if (option.choices) {
    const select = element("select", { id, onchange: () => set(select.value) });
    for (const choice of option.choices) select.append(element("option", { selected: choice === value }, choice));
    return element("div", { class: "choice" }, element("label", { for: id }, option.label), select);
  }
  if (!option.pair) return slider(id, option.label, option, value, set).row;
  const range = [...value];
  const ends = ["smallest", "largest"].map((label, k) =>
    slider(`${id}-${label}`, label, option, value[k], (v) => {
      range[k] = v;
      const other = 1 - k;
      if (range[0] > range[1]) { // push the other end along
        range[other] = v;
        ends[other].input.value = v;
        ends[other].output.value = shown(v);
      }
      set([...range]);
    }),
  );
  return element("fieldset", {}, element("legend", {}, option.label), ...ends.map((end) => end.row));
}

/**
 * Fill two elements with the controls of a masker.
 *
 * @param name of the masker
 * @param options by name; changed by the controls
 * @param main, more elements for the main controls and for the others
 * @param changed called after each change
 */
export function buildControls(name, options, main, more, changed) {
  main.replaceChildren();
  more.replaceChildren();
  for (const option of MASKERS[name].options) {
    const set = (value) => {
      options[option.name] = value;
      changed();
    };
    (option.more ? more : main).append(control(option, options[option.name], set));
  }
}

/** Return a masker and its options as a line of a config; options that are jepa_kit's defaults are left out. */
export function configLine(name, options) {
  const { masker = name, options: described } = MASKERS[name];
  const written = (v) => (Array.isArray(v) ? `[${v.map(written).join(", ")}]` : typeof v === "number" ? `${+v.toFixed(3)}` : `${v}`);
  const parts = described
    .filter((o) => (o.only ? options[o.only[0]] === o.only[1] && options[o.name] : written(options[o.name]) !== written(o.value)))
    .map((o) => `${o.name}: ${written(options[o.name])}`);
  return `masker: {${[`name: ${masker}`, ...parts].join(", ")}}`;
}

