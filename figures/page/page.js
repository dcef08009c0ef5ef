// Theme, method picker, sortable tables. Without this script, the page still shows everything.
const root = document.documentElement;
const dark = window.matchMedia("(prefers-color-scheme: dark)");
root.classList.toggle("dark", dark.matches);
dark.addEventListener("change", () => root.classList.toggle("dark", dark.matches));
document.getElementById("theme").addEventListener("click", () => root.classList.toggle("dark"));

const boxes = [...document.querySelectorAll("#picker input")];
const hidden = document.head.appendChild(document.createElement("style"));
function pick() {
  const names = boxes.filter((box) => !box.checked).map((box) => CSS.escape(box.value));
  hidden.textContent = names.map((name) => `[data-method="${name}"] { display: none; }`).join("\n");
}
boxes.forEach((box) => box.addEventListener("change", pick));
document.querySelectorAll("#picker button").forEach((button) => button.addEventListener("click", () => {
  boxes.forEach((box) => { box.checked = Boolean(button.dataset.all); });
  pick();
}));
pick();

function open() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target instanceof HTMLDetailsElement) target.open = true;
}
window.addEventListener("hashchange", open);
open();

const text = atob(document.getElementById("library").textContent);
const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
const url = URL.createObjectURL(new Blob([bytes], { type: "text/javascript" }));
const { default: DataTable } = await import(url);
URL.revokeObjectURL(url);
document.querySelectorAll("table.sortable").forEach((table) => new DataTable(table, {
  paging: false, info: false, order: [], autoWidth: false,
  layout: { topStart: table.closest(".network") ? null : "search", topEnd: null },
  language: { search: "Filter rows:" },
}));
root.dataset.ready = "true";
