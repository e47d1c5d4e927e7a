// Shows the findings of the chosen severities in which all words occur.
const form = document.querySelector("form");
function filter() {
  const words = form.words.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const article of document.querySelectorAll("article")) {
    const text = article.textContent.toLowerCase();
    article.hidden = !form[article.className].checked || !words.every((word) => text.includes(word));
    const lane = document.querySelector(`[data-finding="${article.id.slice("finding-".length)}"]`);
    lane.style.opacity = article.hidden ? 0.15 : 1;
  }
}
if (form) {
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
}
