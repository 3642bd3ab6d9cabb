/**
 * What is still to happen in a simulated world, by time: a binary heap. Of two things at one time the one that was put in first
 * happens first, so that a seed is one story. Used by ground.ts.
 */

interface Entry {
  readonly at: number;
  readonly order: number;
  readonly act: () => void;
}

const isBefore = (one: Entry, other: Entry): boolean => one.at < other.at || (one.at === other.at && one.order < other.order);

export class Agenda {
  readonly #heap: Entry[] = [];
  #order = 0;

  put(at: number, act: () => void): void {
    const entry: Entry = { at, order: this.#order++, act };
    const heap = this.#heap;
    let index = heap.length;
    heap.push(entry);
    while (index > 0) {
      const parent = (index - 1) >> 1;
      if (!isBefore(entry, heap[parent]!)) break;
      heap[index] = heap[parent]!;
      index = parent;
    }
    heap[index] = entry;
  }

  /** The next entry, which is taken out. Throws when there is none. */
  take(): Entry {
    const heap = this.#heap;
    const first = heap[0];
    if (first === undefined) throw new Error('nothing is to happen any more');
    const entry = heap.pop()!;
    if (heap.length === 0) return first;
    let index = 0;
    for (;;) {
      let child = 2 * index + 1;
      if (child >= heap.length) break;
      if (child + 1 < heap.length && isBefore(heap[child + 1]!, heap[child]!)) child++;
      if (!isBefore(heap[child]!, entry)) break;
      heap[index] = heap[child]!;
      index = child;
    }
    heap[index] = entry;
    return first;
  }
}
