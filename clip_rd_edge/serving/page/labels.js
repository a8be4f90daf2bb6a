// The list of labels, which also shows the results: each row is a text field with a bar behind it.

const list = document.getElementById("labels");
const MAX_LENGTH = 300; // characters of a label that are used
const BANK_ROWS = 8; // rows shown for the bundle's own labels

export class LabelList {
  // onChange() is called when the labels change, onTeach(label) when the image is to teach one; without it, none can.
  constructor(onChange, onTeach) {
    this.onChange = onChange;
    this.onTeach = onTeach;
    this.bank = false;
    const form = document.getElementById("add");
    const field = document.getElementById("new");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.add([field.value]);
      field.value = "";
    });
    // A pasted list becomes one row per line.
    field.addEventListener("paste", (event) => {
      const lines = event.clipboardData.getData("text").split(/\r?\n/).filter((line) => line.trim());
      if (lines.length > 1) {
        event.preventDefault();
        this.add(lines);
      }
    });
    field.addEventListener("change", () => {
      const typed = field.value; // Enter adds it before this acts, when the next label may be half typed
      afterClick(() => field.value === typed && typed.trim() && !this.bank && form.requestSubmit());
    });
    document.getElementById("clear").addEventListener("click", () => {
      list.replaceChildren();
      field.value = "";
      field.focus();
      this.onChange();
    });
    this.form = form;
  }

  // The distinct non-empty labels, or null for the bundle's own.
  get current() {
    if (this.bank) return null;
    const typed = [...list.querySelectorAll("input")].map((input) => input.value.trim()).filter(Boolean);
    return [...new Set(typed)];
  }

  // The typed labels, also while the bundle's own are shown.
  get typedLabels() {
    return this.bank ? this.typed : this.current;
  }

  // Append a row for each label that is not in the list yet, cut like those that are typed.
  // Scroll the last one into view where the user has typed it.
  // Elsewhere, scrolling would make Tab go on from there: in new browsers, what is scrolled to is where Tab starts.
  add(labels) {
    let row = null;
    const rows = new Map([...list.children].map((row) => [row.querySelector("input")?.value.trim(), row]));
    const cut = (text) => [...text.trim()].slice(0, MAX_LENGTH).join("").trim();
    for (const label of labels.map(cut).filter(Boolean)) {
      row = rows.get(label) ?? this.#createRow(label);
      if (!rows.has(label)) list.append(row);
      rows.set(label, row);
    }
    if (this.form.contains(document.activeElement)) row?.scrollIntoView({ block: "nearest" });
    this.onChange();
  }

  // Whether a row other than the given one has this label.
  #isElsewhere(label, row) {
    return [...list.children].some((other) => other !== row && other.querySelector("input")?.value.trim() === label);
  }

  // Switch between typed labels and the bundle's own.
  useBank(bank) {
    if (bank === this.bank) return;
    if (bank) this.typed = this.current;
    this.bank = bank;
    this.form.hidden = bank;
    list.replaceChildren();
    if (bank) this.clear();
    else this.add(this.typed ?? []);
    this.onChange();
  }

  // Typed labels keep their order, so that the eye can follow a bar; the bundle's own are sorted by probability.
  show(result) {
    list.classList.remove("waiting");
    if (this.bank) {
      [...list.children].forEach((row, i) => {
        row.querySelector(".text").textContent = result.labels[i] ?? "";
        this.#setProbability(row, result.probabilities[i] ?? null, i === 0);
      });
      return;
    }
    const probabilities = new Map(result.labels.map((label, i) => [label, result.probabilities[i]]));
    for (const row of list.children) {
      const label = row.querySelector("input").value.trim();
      this.#setProbability(row, label ? probabilities.get(label) ?? 0 : null, label && label === result.labels[0]);
    }
  }

  // Show how many images have taught each label: { label: [...] }.
  showTaught(taught) {
    if (this.bank || !this.onTeach) return;
    for (const row of list.children) {
      const count = taught[row.querySelector("input").value.trim()]?.length ?? 0;
      const button = row.querySelector(".teach");
      button.textContent = count ? `teach · ${count}` : "teach";
      button.classList.toggle("taught", count > 0);
    }
  }

  clear() {
    // Empty rows reserve the space for the bundle's own labels.
    if (this.bank) list.replaceChildren(...Array.from({ length: BANK_ROWS }, () => this.#createBankRow()));
    list.classList.toggle("waiting", this.bank);
    for (const row of list.children) this.#setProbability(row, null, false);
  }

  #setProbability(row, probability, best) {
    row.style.setProperty("--probability", probability ?? 0);
    row.classList.toggle("best", Boolean(best));
    row.querySelector("output").textContent = probability === null ? "" : percent(probability);
  }

  #createRow(label) {
    const row = document.createElement("li");
    const bar = createElement("div", "bar");
    const field = createElement("input", "text");
    field.defaultValue = label; // which WebKit resets it to when the visitor comes back to the page
    field.maxLength = MAX_LENGTH;
    field.dir = "auto";
    field.autocomplete = "off";
    field.setAttribute("aria-label", "Label");
    field.addEventListener("input", () => {
      field.defaultValue = field.value;
      this.onChange();
    });
    field.addEventListener("keydown", (event) => {
      // 229: an input method took it, to confirm what is converted into Japanese or Chinese, say.
      if (event.key === "Enter" && event.keyCode !== 229) document.getElementById("new").focus();
    });
    // Remove an emptied row, or one that now repeats another, when it has lost the focus.
    field.addEventListener("change", () => afterClick(() => {
      const label = field.value.trim();
      if (row.isConnected && (!label || this.#isElsewhere(label, row))) this.#remove(row);
    }));
    const remove = createElement("button", "remove");
    remove.type = "button";
    remove.textContent = "×";
    remove.title = "Remove";
    remove.addEventListener("click", () => this.#remove(row));
    field.addEventListener("input", () => remove.setAttribute("aria-label", `Remove ${field.value}`));
    remove.setAttribute("aria-label", `Remove ${label}`);
    row.append(bar, field, createOutput(), ...(this.onTeach ? [this.#createTeach(field)] : []), remove);
    return row;
  }

  #createTeach(field) {
    const teach = createElement("button", "teach");
    teach.type = "button";
    teach.textContent = "teach";
    teach.title = "The image shows this: teach the label by it";
    teach.addEventListener("click", () => this.onTeach(field.value.trim()));
    return teach;
  }

  #createBankRow() {
    const row = document.createElement("li");
    const text = createElement("span", "text");
    text.dir = "auto";
    row.append(createElement("div", "bar"), text, createOutput());
    return row;
  }

  #remove(row) {
    // Keep the keyboard focus in the list: without this it would return to the top of the page.
    const next = row.nextElementSibling ?? row.previousElementSibling;
    const focused = row.contains(document.activeElement);
    row.remove();
    if (focused) (next?.querySelector(".remove") ?? document.getElementById("new")).focus();
    this.onChange();
  }
}

export function percent(probability) {
  const value = probability * 100;
  return `${value < 9.95 ? value.toFixed(1) : value.toFixed(0)} %`;
}

let pressed = false; // whether a button of the mouse, or a finger, is down
addEventListener("pointerdown", () => (pressed = true), true);
for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => (pressed = false), true);

// Act when the key or click that takes the focus from a field has done its work: what moves away under the pointer would
// not be clicked, and Tab goes on from what has the focus.
function afterClick(action) {
  if (pressed) addEventListener("pointerup", () => setTimeout(action), { once: true });
  else setTimeout(action);
}

// A percentage. Screen readers would read out each change of an output; the headline says what matters.
function createOutput() {
  const output = createElement("output");
  output.setAttribute("aria-live", "off");
  return output;
}

function createElement(tag, className = "") {
  const element = document.createElement(tag);
  element.className = className;
  return element;
}
