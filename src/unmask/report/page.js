// Details of a token: by pointer, touch, or the keys left, right, Home and End.
const blames = JSON.parse(document.getElementById("blames").textContent);
const signed = (x, digits) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);

for (const box of document.querySelectorAll(".blame")) {
  const blame = blames[Number(box.dataset.blame)];
  const tokens = [...box.querySelectorAll(".t")];
  const detail = box.querySelector(".detail");
  const row = detail.querySelector("template");

  function show(at) {
    const token = blame.tokens[at];
    const low = Math.min(0, ...token.credits), high = Math.max(0, ...token.credits), span = high - low || 1;
    tokens.forEach((other, i) => { other.setAttribute("aria-pressed", i === at); other.tabIndex = i === at ? 0 : -1; });
    detail.querySelector("[data-what]").textContent = token.text;
    detail.querySelector("[data-layer]").textContent =
      token.layer === null ? "no layer stands out" : `${token.layer} put it there`;
    detail.querySelector("[data-sum]").textContent = `log-probability ${signed(token.logprob, 3)} nats`;
    detail.querySelectorAll(".bar").forEach((old) => old.remove());
    token.credits.forEach((credit, i) => {
      const bar = row.content.firstElementChild.cloneNode(true);
      bar.classList.add("l" + blame.places[i]);
      bar.querySelector("[data-mark]").textContent = blame.marks[i];
      bar.querySelector("[data-name]").textContent = blame.layers[i];
      bar.querySelector("b").textContent = signed(credit, 3);
      bar.style.setProperty("--zero", (100 * -low) / span + "%");
      bar.style.setProperty("--from", (100 * (Math.min(0, credit) - low)) / span + "%");
      bar.style.setProperty("--size", (100 * Math.abs(credit)) / span + "%");
      detail.append(bar);
    });
  }

  tokens.forEach((token, at) => {
    token.addEventListener("pointerenter", () => show(at));
    token.addEventListener("focus", () => show(at));
    token.addEventListener("click", () => show(at));
    token.addEventListener("keydown", (event) => {
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1 }[event.key];
      if (to === undefined || !tokens[to]) return;
      event.preventDefault();
      tokens[to].focus();
    });
  });
  if (tokens.length) { detail.hidden = false; show(blame.start); }
}
