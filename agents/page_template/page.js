"use strict";
// The page itself: texts that HTML cannot carry, and the choice of a theme.

for (const element of document.querySelectorAll("[data-text]")) {
  element.textContent = JSON.parse(element.dataset.text);
}

{
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");

  const isDark = () => (root.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
  const nameButton = () => { button.textContent = isDark() ? "Light theme" : "Dark theme"; };

  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    nameButton();
  });
  prefersDark.addEventListener("change", nameButton);
  nameButton();
  button.hidden = false;
}
