/** What reaches a simulated run from outside: its user's wishes, and what other runs leave it. Made by world.ts, read by orchestrator.ts. */
import type { Share } from '../../orchestrator/share.ts';
import type { Ground } from './ground.ts';

export class Outside {
  readonly #ground: Ground;
  /** Each is another object, so that the same wish twice is two wishes. */
  wish: { readonly wish: 'pause' | 'resume' | 'cancel' } | null = null;
  /** What is this run's to use; null: all that there is. */
  share: Share | null = null;

  constructor(ground: Ground) {
    this.#ground = ground;
  }

  resumeLater(delayMs: number): void {
    this.#ground.at(delayMs, () => void (this.wish = { wish: 'resume' }));
  }
}
