/** The gate lets one job at a time onto the compute thread, in order, and never loses a turn. */
import { expect } from 'chai';
import { Gate } from '../../workers/gate.ts';

describe('gate', () => {
  it('lets one in at a time, first come, first served', async () => {
    const gate = new Gate();
    const order: number[] = [];
    let inside = 0;
    const visit = async (number: number): Promise<void> => {
      const leave = (await gate.enter(Number.POSITIVE_INFINITY))!;
      expect(++inside).to.equal(1);
      order.push(number);
      await new Promise((resolve) => setImmediate(resolve));
      inside--;
      leave();
    };
    await Promise.all([1, 2, 3, 4, 5].map(visit));
    expect(order).to.deep.equal([1, 2, 3, 4, 5]);
    expect(gate.busy).to.equal(false);
  });

  it('tells who will not wait longer, and keeps the place of the others', async () => {
    const gate = new Gate();
    const leave = (await gate.enter(0))!;
    const patient = gate.enter(Number.POSITIVE_INFINITY);
    expect(await gate.enter(1)).to.equal(null);
    leave();
    const next = await patient;
    expect(next).to.not.equal(null);
    expect(gate.busy).to.equal(true);
    next!();
    expect(gate.busy).to.equal(false);
  });

  it('does not end another’s turn when a turn is ended twice', async () => {
    const gate = new Gate();
    const first = (await gate.enter(0))!;
    const second = gate.enter(Number.POSITIVE_INFINITY);
    first();
    await second;
    first();
    expect(gate.busy).to.equal(true);
  });

  it('says when it is idle, and only then', async () => {
    let idle = 0;
    const gate = new Gate(() => idle++);
    const first = (await gate.enter(0))!;
    const second = gate.enter(Number.POSITIVE_INFINITY);
    first();
    expect(idle).to.equal(0);
    (await second)!();
    expect(idle).to.equal(1);
  });

  it('lets nobody in after it was closed, and does not keep those who waited', async () => {
    const gate = new Gate();
    const leave = (await gate.enter(0))!;
    const waiting = gate.enter(Number.POSITIVE_INFINITY);
    gate.close();
    expect(await waiting).to.equal(null);
    expect(await gate.enter(Number.POSITIVE_INFINITY)).to.equal(null);
    leave();
    expect(gate.busy).to.equal(false);
  });
});
