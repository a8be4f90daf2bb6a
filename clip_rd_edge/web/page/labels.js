// The list of labels, which is also the list of bars: each row is a field to type in, with its bar behind it.

const list = document.getElementById("labels");
const SHOWN = 8; // rows, where the labels are the bundle's own

export class Labels {
  constructor(changed) {
    this.changed = changed;
    this.bank = false;
    const form = document.getElementById("add");
    const field = document.getElementById("new");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.add([field.value]);
      field.value = "";
    });
    // A list that is pasted becomes a row a line.
    field.addEventListener("paste", (event) => {
      const lines = event.clipboardData.getData("text").split(/\r?\n/).filter((line) => line.trim());
      if (lines.length > 1) {
        event.preventDefault();
        this.add(lines);
      }
    });
    field.addEventListener("change", () => {
      if (field.value.trim()) form.requestSubmit();
    });
    this.form = form;
  }

  // Labels as they are typed, without empty ones; null where the bundle's own are asked for.
  get current() {
    if (this.bank) return null;
    const typed = [...list.querySelectorAll("input")].map((input) => input.value.trim()).filter(Boolean);
    return [...new Set(typed)];
  }

  add(labels) {
    for (const label of labels.map((each) => each.trim()).filter(Boolean)) list.append(this.#row(label));
    this.changed();
  }

  useBank(bank) {
    if (bank === this.bank) return;
    if (bank) this.typed = this.current;
    this.bank = bank;
    this.form.hidden = bank;
    list.replaceChildren();
    if (bank) this.clear();
    else this.add(this.typed ?? []);
    this.changed();
  }

  // Bars of typed labels stay where they are, so that the eye can follow one; the bundle's own come likeliest first.
  show(answer) {
    if (this.bank) {
      [...list.children].forEach((row, place) => {
        row.querySelector(".text").textContent = answer.labels[place] ?? "";
        this.#set(row, answer.probabilities[place] ?? null, place === 0);
      });
      return;
    }
    const shares = new Map(answer.labels.map((label, place) => [label, answer.probabilities[place]]));
    for (const row of list.children) {
      const label = row.querySelector("input").value.trim();
      this.#set(row, label ? shares.get(label) ?? 0 : null, label && label === answer.labels[0]);
    }
  }

  clear() {
    // Empty rows keep the place of those to come.
    if (this.bank) list.replaceChildren(...Array.from({ length: SHOWN }, () => this.#plainRow()));
    for (const row of list.children) this.#set(row, null, false);
  }

  #set(row, share, best) {
    row.style.setProperty("--share", share ?? 0);
    row.classList.toggle("best", Boolean(best));
    row.querySelector("output").textContent = share === null ? "" : percent(share);
  }

  #row(label) {
    const row = document.createElement("li");
    const bar = element("div", "bar");
    const field = element("input", "text");
    field.value = label;
    field.maxLength = 300;
    field.dir = "auto";
    field.autocomplete = "off";
    field.setAttribute("aria-label", "Label");
    field.addEventListener("input", () => this.changed());
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") document.getElementById("new").focus();
    });
    // A row that was emptied goes when it is left.
    field.addEventListener("change", () => {
      if (!field.value.trim()) this.#remove(row);
    });
    const remove = element("button", "remove");
    remove.type = "button";
    remove.textContent = "×";
    remove.title = "Remove";
    remove.addEventListener("click", () => this.#remove(row));
    field.addEventListener("input", () => remove.setAttribute("aria-label", `Remove ${field.value}`));
    remove.setAttribute("aria-label", `Remove ${label}`);
    row.append(bar, field, element("output"), remove);
    return row;
  }

  #plainRow() {
    const row = document.createElement("li");
    const text = element("span", "text");
    text.dir = "auto";
    row.append(element("div", "bar"), text, element("output"));
    return row;
  }

  #remove(row) {
    // The keyboard's focus goes to the next row, not to the top of the page.
    const next = row.nextElementSibling ?? row.previousElementSibling;
    const focused = row.contains(document.activeElement);
    row.remove();
    if (focused) (next?.querySelector(".remove") ?? document.getElementById("new")).focus();
    this.changed();
  }
}

export function percent(share) {
  const value = share * 100;
  return `${value < 9.95 ? value.toFixed(1) : value.toFixed(0)} %`;
}

function element(tag, name = "") {
  const made = document.createElement(tag);
  made.className = name;
  return made;
}
