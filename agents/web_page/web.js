"use strict";
// All pages work without this script. With it the page stays while an answer is on its way, a line
// that could not be sent stays in its field, and Enter sends.

let busy = false;
document.documentElement.classList.add("with-script");

document.addEventListener("submit", (event) => {
  if (busy) {
    event.preventDefault();
  } else if (event.target.matches("[data-live]")) {
    event.preventDefault();
    send(event.target);
  } else {
    setBusy(true);
  }
});

document.addEventListener("keydown", (event) => {
  if (event.target.id !== "line" || event.key !== "Enter") return;
  if (event.shiftKey || event.isComposing) return;
  event.preventDefault();
  event.target.form.requestSubmit();
});

document.addEventListener("change", showPersonas);
window.addEventListener("pageshow", () => setBusy(false));
showPersonas();
scrollToEnd();

async function send(form) {
  const body = new URLSearchParams(new FormData(form));
  const waiting = form.matches(".say") ? showWaiting(form, body.get("line")) : [];
  setBusy(true);
  try {
    const answer = await fetch(form.action, { method: "POST", body });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const said = page.querySelector(".notice p");
    if (answer.ok && page.querySelector("main.dialogue")) {
      show(page.querySelector("main"), form.matches(".say") && !waiting.length);
    } else {
      fail(waiting, said ? said.textContent : "The server answered with an error.");
    }
  } catch {
    fail(waiting, "The server does not answer. Is ppg play still running? Your line is kept.");
  } finally {
    setBusy(false);
  }
}

// What was typed and not sent stays, after what the server gives back to be changed.
function show(main, fieldWasSent) {
  const unsent = fieldWasSent ? "" : document.getElementById("line")?.value;
  document.querySelector("main").replaceWith(main);
  const field = document.getElementById("line");
  if (field && unsent) {
    field.value = unsent.includes(field.value) ? unsent : `${field.value}\n${unsent}`;
  }
  scrollToEnd();
}

function showWaiting(form, line) {
  if (!line.trim()) return [];
  const items = [
    bubble("yours", form.dataset.you, line),
    bubble("theirs waiting", form.dataset.other, "…"),
  ];
  document.querySelector(".log").append(...items);
  form.querySelector("#line").value = "";
  scrollToEnd();
  return items;
}

function bubble(kind, who, text) {
  const item = document.createElement("li");
  item.className = `line ${kind}`;
  for (const [name, words] of [["who-speaks", who], ["text", text]]) {
    const paragraph = document.createElement("p");
    paragraph.className = name;
    paragraph.dir = "auto";
    paragraph.textContent = words;
    item.append(paragraph);
  }
  return item;
}

function fail(waiting, why) {
  const notice = document.querySelector(".notice");
  notice.querySelector("p").textContent = why;
  notice.querySelector(".detail").textContent = "";
  notice.hidden = false;
  if (waiting.length) document.getElementById("line").value = waiting[0].lastChild.textContent;
  waiting.forEach((item) => item.remove());
}

function setBusy(value) {
  busy = value;
  document.documentElement.toggleAttribute("aria-busy", value);
  document.querySelectorAll("form button").forEach((button) => (button.disabled = value));
}

function scrollToEnd() {
  const log = document.querySelector(".log");
  if (log) log.scrollTop = log.scrollHeight;
  document.getElementById("now")?.scrollIntoView({ block: "end" });
  document.getElementById("line")?.focus({ preventScroll: true });
}

function showPersonas() {
  const chosen = document.querySelector("input[name=domain]:checked");
  document.querySelectorAll("[data-domain]").forEach((label) => {
    label.hidden = chosen !== null && label.dataset.domain !== chosen.value;
  });
}
