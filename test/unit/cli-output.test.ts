/** What the command line writes: tables and bars in 80 columns, colour only where it is wanted, nothing that drives a terminal. */
import { stripVTControlCharacters } from 'node:util';
import { expect } from 'chai';
import fc from 'fast-check';
import { ProgressBar, colourOn, fields, fit, formatBytes, formatDuration, printable, table, wrap } from '../../cli/output.ts';

/** A stream that remembers what was written, as a terminal or not. */
function fakeStream(isTTY: boolean): { stream: NodeJS.WriteStream; text: () => string } {
  const written: string[] = [];
  const stream = { isTTY, columns: 80, write: (text: string) => written.push(text) > 0 };
  return { stream: stream as unknown as NodeJS.WriteStream, text: () => written.join('') };
}

describe('cli output', () => {
  it('shows colour on a terminal, unless NO_COLOR or TERM=dumb says no', () => {
    expect(colourOn({ isTTY: true }, {})).to.equal(true);
    expect(colourOn({ isTTY: false }, {})).to.equal(false);
    expect(colourOn({}, {})).to.equal(false);
    expect(colourOn({ isTTY: true }, { NO_COLOR: '1' })).to.equal(false);
    expect(colourOn({ isTTY: true }, { NO_COLOR: '1', FORCE_COLOR: '1' })).to.equal(false);
    expect(colourOn({ isTTY: true }, { TERM: 'dumb' })).to.equal(false);
    expect(colourOn({ isTTY: false }, { FORCE_COLOR: '1' })).to.equal(true);
    expect(colourOn({ isTTY: true }, { FORCE_COLOR: '0' })).to.equal(false);
    expect(colourOn({ isTTY: true }, { NO_COLOR: '' })).to.equal(true);
  });

  it('keeps every line of a table within 80 columns', () => {
    const cell = fc.string({ maxLength: 60 }).map((text) => text.replace(/\p{Cc}/gu, ''));
    fc.assert(
      fc.property(fc.array(fc.tuple(cell, cell, cell), { maxLength: 10 }), (rows) => {
        const lines = table([{ title: 'A' }, { title: 'B', align: 'right' }, { title: 'C' }], rows);
        expect(lines).to.have.length(rows.length + 1);
        for (const line of lines) expect(Array.from(line).length).to.be.at.most(80);
      }),
    );
  });

  it('aligns columns', () => {
    expect(table([{ title: 'RUN' }, { title: 'STEP', align: 'right' }], [['a', '1/10'], ['longer', '10/10']])).to.deep.equal([
      'RUN      STEP',
      'a        1/10',
      'longer  10/10',
    ]);
  });

  it('wraps at spaces and leaves long words whole', () => {
    expect(wrap('aa bb cc', 5)).to.deep.equal(['aa bb', 'cc']);
    expect(wrap('x'.repeat(90), 80)).to.deep.equal(['x'.repeat(90)]);
    expect(fields([['name', 'v'], ['longer', 'w']])).to.deep.equal(['name    v', 'longer  w']);
  });

  it('makes control characters of foreign text visible', () => {
    expect(printable('a\u001b[31mb\u0007\n')).to.equal('a\\x1b[31mb\\x07\\x0a');
    expect(fit('abcdef', 4)).to.equal('abc…');
  });

  it('names bytes and durations', () => {
    expect([0, 1, 1023, 1024, 15.3e6, 3 * 2 ** 40].map(formatBytes)).to.deep.equal(['0 B', '1 B', '1023 B', '1.0 KiB', '14.6 MiB', '3.0 TiB']);
    expect([0, 59_400, 60_000, 125_000, 3_600_000, 200 * 3_600_000].map(formatDuration)).to.deep.equal([
      '0 s', '59 s', '1 min 00 s', '2 min 05 s', '1 h 00 min', '8 d 8 h',
    ]);
  });

  it('paints a bar on a terminal in one line, and prints nothing elsewhere for what is quickly done', () => {
    const terminal = fakeStream(true);
    const bar = new ProgressBar('training', terminal.stream);
    bar.update(5, 10, 'step 5/10 loss 1.234');
    bar.update(10, 10, 'step 10/10 loss 1.234');
    bar.end();
    expect(terminal.text()).to.contain('\r\u001b[2K').and.to.contain(' 50% step 5/10').and.to.match(/100% step 10\/10 loss 1\.234\n$/);
    for (const line of terminal.text().split(/\r|\n/).map(stripVTControlCharacters)) expect(Array.from(line).length).to.be.below(80);

    expect(terminal.text().match(/\n/g)).to.have.length(1);

    // What is done before the first line is due prints nothing elsewhere.
    const pipe = fakeStream(false);
    const plain = new ProgressBar('training', pipe.stream);
    plain.update(1, 10, 'one');
    plain.update(10, 10, 'last');
    plain.end();
    plain.end();
    expect(pipe.text()).to.equal('');
  });
});
