/** Call `handler` once the input has been quiet for `delay` milliseconds. */
export function debounce(handler, delay = 200) {
  let timer = null;
  return (...args) => {
    clearTimeout(timer);
    timer = setTimeout(() => handler(...args), delay);
  };
}

const field = document.querySelector("#search");
field.addEventListener("input", debounce(async (event) => {
  const query = event.target.value.trim();
  if (query === "") return;
  const response = await fetch(`/api/search?q=${encodeURIComponent(query)}`);
  if (!response.ok) throw new Error(`search failed: ${response.status}`);
  const { results } = await response.json();
  document.querySelector("#results").textContent = results.map((r) => r.title).join("\n");
}));
