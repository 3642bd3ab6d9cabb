/** Sums of reports do not depend on who computed what; pauses, commands and the log's length are what their tables say. */
import { expect } from 'chai';
import { array, assert, constantFrom, double, property } from 'fast-check';
import { parseResult } from '../../config/messages.ts';
import type { ShardReport } from '../../config/messages.ts';
import { loadConfig } from '../../config/schema.ts';
import { commandFor, stronger } from '../../workers/control.ts';
import { restartPauseMs } from '../../workers/main.ts';
import { flowMilliseconds, logLength, sumMicrobatches, sumShards } from '../../workers/reports.ts';
import type { MicrobatchNumbers } from '../../workers/reports.ts';
import { COMMANDS, Signals } from '../../workers/signals.ts';

const outcome = { gradientNorm: 1.5, clipScale: 0.5, learningRate: 1e-3, skipped: false, nonFinite: null };
const microbatch = (lossSum: number): MicrobatchNumbers => ({ lossSum, targetTokens: 8, aux: [1.25, lossSum], expertLoad: [[1, 2], [3, 4]] });

describe('reports of workers', () => {
  it('are the same bits whether shards travelled as JSON or not', () => {
    const any = double({ noNaN: true, noDefaultInfinity: true });
    assert(
      property(array(array(any, { minLength: 3, maxLength: 3 }), { minLength: 1, maxLength: 6 }), (losses) => {
        const shards = losses.map((shard) => sumMicrobatches(shard.map(microbatch)));
        const travelled = JSON.parse(JSON.stringify(shards)) as ShardReport[];
        expect(sumShards(1, travelled, 6, outcome, 1)).to.deep.equal(sumShards(1, shards, 6, outcome, 1));
      }),
    );
  });

  it('divide losses by target tokens and aux losses by microbatches', () => {
    const shards = [sumMicrobatches([microbatch(8), microbatch(16)]), sumMicrobatches([microbatch(0), microbatch(8)])];
    const report = sumShards(3, shards, 4, outcome, 12);
    expect(report).to.deep.include({ step: 3, loss: 1, auxLoss: [1.25, 8], targetTokens: 32, expertLoad: [[4, 8], [12, 16]], milliseconds: 12 });
  });

  it('say null for what is not finite, and for a step without targets', () => {
    const shards = [sumMicrobatches([microbatch(Number.NaN)]), sumMicrobatches([microbatch(1)])];
    const report = sumShards(1, shards, 2, { ...outcome, gradientNorm: Number.POSITIVE_INFINITY, skipped: true, nonFinite: 'lm_head.weight' }, 1);
    expect([report.loss, report.auxLoss[0], report.auxLoss[1], report.gradientNorm]).to.deep.equal([null, 1.25, null, null]);
    expect(sumShards(1, [sumMicrobatches([{ ...microbatch(0), targetTokens: 0 }])], 1, outcome, 1).loss).to.equal(null);
    parseResult('stepProgress', { worker: 'w', epoch: 0, report });
  });

  it('take a flow to last as long as its busiest worker and the reduction', () => {
    const shard = (worker: string, ms: number): Parameters<typeof flowMilliseconds>[0][number] => ({ worker, timings: { computeMs: ms, exchangeMs: 1, waitMs: 0 } });
    expect(flowMilliseconds([shard('a', 9), shard('b', 5), shard('b', 6)], 3)).to.equal(16);
  });

  it('keep two sums at least in the log', () => {
    expect(logLength(0, 100)).to.equal(2);
    expect(logLength(1000, 100)).to.equal(10);
    expect(logLength(1050, 100)).to.equal(10);
  });
});

describe('commands of workers', () => {
  it('drop what is of an older epoch and what has no run, and obey the rest', () => {
    expect(commandFor(null, 0)).to.equal('drop');
    expect(commandFor({ epoch: 2, command: 'run' }, 1)).to.equal('drop');
    expect(commandFor({ epoch: 1, command: 'yield' }, 1)).to.equal('yield');
    expect(commandFor({ epoch: 0, command: 'stop' }, 1)).to.equal('stop');
  });

  it('are ordered by strength', () => {
    assert(property(constantFrom(...COMMANDS), constantFrom(...COMMANDS), (a, b) => {
      expect(COMMANDS.indexOf(stronger(a, b))).to.equal(Math.max(COMMANDS.indexOf(a), COMMANDS.indexOf(b)));
    }));
  });

  it('reach the other side of the shared memory', () => {
    const here = new Signals();
    const there = new Signals(here.shared);
    for (const command of COMMANDS) {
      here.command = command;
      expect(there.command).to.equal(command);
    }
    const before = here.pulse;
    expect(() => there.check()).to.throw('dropped');
    expect(here.pulse).to.equal(before + 1);
    here.command = 'stop';
    there.check();
    expect(() => there.checkStop()).to.throw('stopped');
  });
});

describe('pauses before restarts', () => {
  it('double up to their bound, and are jittered downwards by a half at most', () => {
    const { worker } = loadConfig({ worker: { restartBackoffMs: 100, restartMaximumMs: 1000 } });
    const ends = (failures: number): [number, number] => [restartPauseMs(failures, 0, worker), restartPauseMs(failures, 1, worker)];
    expect([1, 2, 3, 4, 5, 100].map(ends)).to.deep.equal([[50, 100], [100, 200], [200, 400], [400, 800], [500, 1000], [500, 1000]]);
  });
});
