// The page is complete without this: it adds hover cards, lit wires, and one stage at a time in the details.
const picture = document.querySelector("svg.pc");
const tip = document.getElementById("tip");
const tabs = [...document.querySelectorAll(".tabs button")];
const details = [...document.querySelectorAll(".detail")];

function choose(stage, scroll) {
  tabs.forEach((tab) => tab.setAttribute("aria-selected", String(tab.dataset.stage === stage)));
  details.forEach((detail) => { detail.hidden = detail.dataset.stage !== stage; });
  picture.querySelectorAll(".stage").forEach((g) => g.classList.toggle("chosen", g.dataset.stage === stage));
  if (scroll) document.querySelector(".tabs").scrollIntoView({ behavior: "smooth", block: "start" });
}

function open(module) {
  const detail = document.getElementById(`module-${module}`);
  detail.open = true;
  detail.scrollIntoView({ behavior: "smooth", block: "center" });
}

function light(group) {
  const { edge, module } = group.dataset;
  const lit = (g) => (edge === undefined ? [g.dataset.source, g.dataset.target].includes(module) : g.dataset.edge === edge);
  const wires = edge === undefined && module === undefined ? [] : [...picture.querySelectorAll("[data-edge]")].filter(lit);
  picture.classList.toggle("pointing", wires.length > 0);
  wires.forEach((g) => g.classList.add("lit"));
}

function dim() {
  tip.hidden = true;
  picture.classList.remove("pointing");
  picture.querySelectorAll(".lit").forEach((g) => g.classList.remove("lit"));
}

function place(event) {
  const { width, height } = tip.getBoundingClientRect();
  const below = event.clientY + 18 + height < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${below ? event.clientY + 18 : Math.max(8, event.clientY - height - 12)}px`;
}

for (const group of picture.querySelectorAll("g")) {
  const title = group.querySelector(":scope > title");
  if (!title) continue;
  const text = title.textContent;
  group.setAttribute("aria-label", text.split("\n")[0]);
  title.remove(); // or the browser shows it too
  group.addEventListener("mousemove", (event) => { tip.textContent = text; tip.hidden = false; place(event); });
  group.addEventListener("mouseenter", () => light(group));
  group.addEventListener("mouseleave", dim);
  const { stage, module } = group.dataset;
  if (stage === undefined) continue;
  group.addEventListener("click", () => { choose(stage, module === undefined); if (module !== undefined) open(module); });
}
for (const group of picture.querySelectorAll(".stage")) {
  group.setAttribute("tabindex", "0");
  group.setAttribute("role", "button");
  group.addEventListener("keydown", (event) => { if (["Enter", " "].includes(event.key)) { event.preventDefault(); choose(group.dataset.stage, true); } });
}
tabs.forEach((tab) => tab.addEventListener("click", () => choose(tab.dataset.stage, false)));
document.querySelectorAll("tr[data-stage]").forEach((row) => row.addEventListener("click", () => choose(row.dataset.stage, true)));
document.documentElement.classList.add("scripted");
choose("0", false);
