// One button opens or closes all folded code of a page; the choice is kept for the next page.
{
  const folds = document.querySelectorAll("details.code")
  const place = document.querySelector("p.where")
  if (folds.length && place) {
    const button = document.createElement("button")
    const set = (open) => {
      folds.forEach((fold) => (fold.open = open))
      button.textContent = open ? "Fold all code" : "Open all code"
      button.setAttribute("aria-pressed", open)
      localStorage.setItem("lmnotes-code", open ? "open" : "folded")
    }
    button.className = "fold-all"
    button.addEventListener("click", () => set(button.getAttribute("aria-pressed") !== "true"))
    place.append(button)
    set(localStorage.getItem("lmnotes-code") === "open")
  }
  // A link into folded code opens it
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)))
  for (let fold = target && target.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true
}
