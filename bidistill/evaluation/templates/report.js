// Filters the replies: rows that hold the text, and on demand those whose verdict changed.
const search = document.getElementById("search");
const changed = document.getElementById("changed");
const rows = [...document.querySelectorAll("tr[data-changed]")];
const groups = [...document.querySelectorAll("details.group")];
const open = new Map(groups.map((group) => [group, group.open]));

function filter() {
  const wanted = search.value.trim().toLowerCase();
  for (const row of rows) {
    const skip = changed.checked && row.dataset.changed === "no";
    row.hidden = skip || !row.textContent.toLowerCase().includes(wanted);
  }
  for (const group of groups) {
    const shown = group.querySelectorAll("tr[data-changed]:not([hidden])").length;
    group.hidden = shown === 0;
    group.open = wanted || changed.checked ? true : open.get(group);
  }
  const left = rows.filter((row) => !row.hidden).length;
  document.getElementById("count").textContent = `${left} of ${rows.length}`;
}

document.getElementById("filter").hidden = false;
search.addEventListener("input", filter);
changed.addEventListener("change", filter);
filter();
