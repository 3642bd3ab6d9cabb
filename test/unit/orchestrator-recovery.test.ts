/**
 * What a new driver believes of what Redis tells of its run, and which epoch follows when it believes nothing.
 */
import { expect } from 'chai';
import { parseRunSpec } from '../../config/run-spec.ts';
import { believe } from '../../orchestrator/recovery.ts';
import { queuedRecord } from '../../orchestrator/run-state.ts';

describe('recovery: what Redis tells of a run', () => {
  const spec = parseRunSpec({ name: 'r', model: 'tiny', data: { train: 't' }, steps: 9, batch: { shards: 1, sequences: 1, sequenceLength: 4 } });
  const of = (epoch: number): ReturnType<typeof queuedRecord> => ({ ...queuedRecord('r', spec, 0), phase: 'running', epoch });
  const control = { epoch: 5, command: 'run' } as const;

  it('is believed when the disk knows of no later epoch and Redis is the one that it was', () => {
    for (const kept of [null, of(4), of(5)]) {
      expect(believe({ record: of(4), control, kept, restarted: false })).to.deep.equal({ record: of(4), control, lost: false });
    }
  });

  it('is void when the disk is ahead, or Redis was started anew: the next epoch is above all that were told, and a lost second more', () => {
    for (const [kept, restarted, above] of [[of(7), false, 7], [of(5), true, 5], [null, true, 5], [of(2), true, 5]] as const) {
      const believed = believe({ record: of(4), control, kept, restarted });
      expect(believed).to.deep.include({ control: null, lost: true });
      expect(believed.record.epoch).to.be.above(above + 100);
      expect(believed.record).to.deep.equal(of(believed.record.epoch));
    }
  });
});
