/**
 * Work that repeats: the same kernels over the same buffers, which a device that records graphs then gets as one launch instead of
 * hundreds. Knows nothing of what the kernels do. Used by the network, the trainer and the decoder.
 *
 *   first run of a key: the calls themselves, which also load the kernels' code | second: recorded, then launched | from then on: launched
 */
import type { Device, Graph } from '../../cuda/device.ts';

export class Replay {
  readonly #device: Device;
  readonly #isOn: boolean;
  #key: string | undefined;
  #graph: Graph | undefined;

  /** Without `graph`, and on a device without graphs, the calls are made each time. */
  constructor(device: Device, graph: boolean) {
    this.#device = device;
    this.#isOn = graph && device.recordsGraphs;
  }

  /**
   * Queues what `calls` calls. `key` stands for everything that a recording fixes: the same key promises the same addresses, sizes and
   * scalars. One graph is held; another key discards it.
   */
  run(key: string, calls: () => void): void {
    if (!this.#isOn || key !== this.#key) {
      this.close();
      this.#key = key;
      calls();
      return;
    }
    this.#graph ??= this.#device.record(calls);
    this.#device.launch(this.#graph);
  }

  /** Discards the graph. */
  close(): void {
    if (this.#graph !== undefined) this.#device.discard(this.#graph);
    this.#graph = undefined;
    this.#key = undefined;
  }
}
