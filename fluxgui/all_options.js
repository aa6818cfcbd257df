// The form of all options: search, level, changed ones, reset. Values are kept in the lines of "More options" alone.
const root = element.querySelector(".all-options");
const search = root.querySelector("#options-search");
const level = root.querySelector("#options-level");
const onlyChanged = root.querySelector("#options-changed");
const status = root.querySelector("#options-status");
const none = root.querySelector(".options-none");
const rows = [...root.querySelectorAll(".option")];
const LEVELS = ["basic", "advanced", "expert"];
const LINE = /^\s*([A-Za-z]\w*)\s*=\s*(.*?)\s*$/;
const NUMBER = /^[+-]?(\d+)(\.\d+)?([eE][+-]?\d+)?$/;

const control = (row) => row.querySelector("[data-type]");
const lines = () => document.querySelector("#field-more_options textarea");

// A line's value as its control shows it; undefined when it is something that only the lines can hold.
function read(text, input) {
  try {
    if (input.dataset.list) return JSON.parse(text.replace(/,\s*\]$/, "]")).map(String).join("\n");
    if (text === "true" || text === "false") return text === "true";
    if (NUMBER.test(text)) return text;
    if (/^'[^']*'$/.test(text)) return text.slice(1, -1);
    return String(JSON.parse(text));
  } catch {
    return undefined;
  }
}

// A control's value as a line has it; null when it says nothing.
function written(input) {
  if (input.type === "checkbox") return input.checked ? "true" : null;
  const text = input.value.trim();
  if (!text) return null;
  const numeric = input.dataset.type === "number" || input.dataset.type === "integer" || input.dataset.type === "steps";
  // TOML wants a digit on both sides of the point.
  const plain = (part) => part.replace(/^([+-]?)\./, "$10.").replace(/^([+-]?\d+)\.(?=$|[eE])/, "$1.0");
  const value = (part) => (numeric && NUMBER.test(plain(part)) ? plain(part) : JSON.stringify(part));
  if (!input.dataset.list) return value(text);
  return `[${text.split("\n").map((part) => part.trim()).filter(Boolean).map(value).join(", ")}]`;
}

function put(name, value) {
  const area = lines();
  const kept = area.value.split("\n").filter((line) => line.trim() && (LINE.exec(line) ?? [])[1] !== name);
  // In front: a section in the lines would take what comes after it.
  if (value !== null) kept.unshift(`${name} = ${value}`);
  area.value = kept.join("\n");
  area.dispatchEvent(new Event("input", { bubbles: true }));
  show();
}

// Every control shows what the lines say.
function show() {
  const area = lines();
  if (!area) return;
  const found = {};
  for (const line of area.value.split("\n")) {
    const match = LINE.exec(line);
    if (match) found[match[1]] = match[2];
  }
  for (const row of rows) {
    const input = control(row);
    if (!input) continue;
    const text = found[row.dataset.name];
    const value = text === undefined ? "" : read(text, input);
    input.disabled = value === undefined;
    input.title = value === undefined ? TEXTS.unreadable : "";
    if (input !== document.activeElement) {
      if (input.type === "checkbox") input.checked = value === true;
      else input.value = value ?? "";
    }
    row.classList.toggle("changed", text !== undefined);
    row.querySelector(".options-back").hidden = text === undefined;
  }
  filter();
}

function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const most = LEVELS.indexOf(level.value);
  let shown = 0;
  for (const row of rows) {
    const changed = row.classList.contains("changed");
    // What was searched for or changed is shown at every level.
    const fits = words.length ? words.every((word) => row.dataset.words.includes(word)) : LEVELS.indexOf(row.dataset.level) <= most || changed;
    row.hidden = !fits || (onlyChanged.checked && !changed);
    shown += row.hidden ? 0 : 1;
  }
  for (const group of root.querySelectorAll(".options-group")) {
    const inside = [...group.querySelectorAll(".option")].filter((row) => !row.hidden);
    group.hidden = !inside.length;
    group.querySelector(".options-count").textContent = `(${inside.length})`;
    if (words.length || onlyChanged.checked) group.open = true;
  }
  none.hidden = shown > 0;
  status.textContent = TEXTS.changed.replace("#", rows.filter((row) => row.classList.contains("changed")).length);
}

for (const input of [search, level, onlyChanged]) input.addEventListener("input", filter);
root.addEventListener("change", (event) => {
  const row = event.target.closest(".option");
  if (row) put(row.dataset.name, written(event.target));
});
root.addEventListener("click", (event) => {
  const back = event.target.closest(".options-back");
  if (back) {
    const row = back.closest(".option");
    control(row).focus();
    control(row).blur();
    put(row.dataset.name, null);
  }
  if (event.target.id === "options-reset") {
    for (const row of rows) if (row.classList.contains("changed")) put(row.dataset.name, null);
  }
});

// Presets and imports change the lines without an event of theirs.
let last = null;
const watch = setInterval(() => {
  if (!root.isConnected) return clearInterval(watch);
  const area = lines();
  if (area && area.value !== last) {
    last = area.value;
    show();
  }
}, 300);
level.value = "advanced";
show();
filter();
