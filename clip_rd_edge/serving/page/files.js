// Image files from a drop, including those in folders, sorted by path.

// items: the DataTransferItemList of a drop. Must be called in the event's handler, after which the list is empty.
// Returns the images, and the paths of files and folders that the browser could not read.
export async function droppedImages(items) {
  const entries = [...items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  const loose = [...items].map((item) => item.getAsFile()).filter(Boolean);
  if (!entries.some((entry) => entry.isDirectory)) return { files: loose, unreadable: [] };
  const found = { files: [], unreadable: [] };
  for (const entry of entries) await collect(entry, found);
  return { ...found, files: imagesOnly(found.files) };
}

// As IMAGE_SUFFIXES in bundle/image_files.py. The types that browsers name depend on the system, and include RAW files.
const SUFFIXES = /\.(avif|bmp|gif|hei[cf]|hif|jfif|jpe|jpe?g|p[gnp]m|png|tiff?|webp)$/i;

// The images among the files of a folder; files that were chosen one by one are never left out.
export function imagesOnly(files) {
  const path = (file) => file.webkitRelativePath || file.name;
  const shown = [...files].filter((file) => SUFFIXES.test(file.name));
  const own = shown.filter((file) => !path(file).split("/").slice(1).some(isIgnored)); // the first part was chosen
  return own.sort((a, b) => path(a).localeCompare(path(b), "en", { numeric: true }));
}

// As `is_ignored` in bundle/image_files.py: whether a file or subfolder is hidden, or another program's.
function isIgnored(name) {
  return name.startsWith(".") || name === "__MACOSX" || name === "@eaDir";
}

async function collect(entry, found) {
  if (isIgnored(entry.name)) return;
  try {
    if (entry.isFile) {
      found.files.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
      return;
    }
    const reader = entry.createReader();
    for (;;) {
      const batch = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // at most 100 at a time
      if (!batch.length) return;
      for (const child of batch) await collect(child, found);
    }
  } catch {
    found.unreadable.push(entry.fullPath.slice(1));
  }
}
