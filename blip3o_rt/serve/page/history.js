// What was drawn, newest first, kept in this browser: a small image, and the link that draws it again.
const KEPT = 40;
const SIDE = 128;

export class History {
  constructor(section, list) {
    this.section = section;
    this.list = list;
    try {
      this.entries = JSON.parse(localStorage.getItem("history") ?? "[]");
    } catch {
      this.entries = [];
    }
  }

  async add(drawn, image, link) {
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = SIDE;
    canvas.getContext("2d").drawImage(image, 0, 0, SIDE, SIDE);
    const entry = { prompt: drawn.prompt, seed: drawn.seed, link: link.slice(link.indexOf("#")), image: canvas.toDataURL("image/webp", 0.8) };
    this.entries = [entry, ...this.entries.filter((other) => other.link !== entry.link)].slice(0, KEPT);
    this.save();
    this.show();
  }

  save() {
    try {
      localStorage.setItem("history", JSON.stringify(this.entries));
    } catch {
      this.entries = this.entries.slice(0, Math.floor(this.entries.length / 2)); // the browser's room is full
    }
  }

  clear() {
    this.entries = [];
    this.save();
    this.show();
  }

  show() {
    this.section.hidden = this.entries.length === 0;
    this.list.replaceChildren(...this.entries.map((entry) => {
      const item = document.createElement("li");
      const link = document.createElement("a");
      const image = document.createElement("img");
      link.href = `/${entry.link}`;
      image.src = entry.image;
      image.alt = "";
      link.append(image, `${entry.prompt.slice(0, 60)} (seed ${entry.seed})`);
      item.append(link);
      return item;
    }));
  }
}
