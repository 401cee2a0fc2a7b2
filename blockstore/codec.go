package blockstore

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// codec says how a record's payload is compressed. The numbers are part of
// the format.
type codec uint8

const (
	codecNone codec = 0
	codecZstd codec = 1 // a zstd frame, RFC 8878
	codecS2   codec = 2 // an S2 block
)

const (
	// decodeSlack is how many bytes of capacity behind its result let zstd decode
	// without looking at each end: a sixth less time.
	decodeSlack = 64
	// A chunk is stored compressed if that saves at least 1/minSaving of it.
	minSaving = 32
	// One compressed chunk in checkEvery, chosen by its id, is decoded again and compared before
	// it is stored. Encoders have produced corrupt output before; decoding every
	// chunk costs a quarter of the time that compressing takes.
	checkEvery = 16
)

// coder compresses and expands payloads. It is safe for concurrent use.
type coder struct {
	enc *zstd.Encoder
	dec *zstd.Decoder
}

func newCoder() (*coder, error) {
	procs := runtime.GOMAXPROCS(0)
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(procs),
		zstd.WithEncoderCRC(false), zstd.WithWindowSize(256<<10))
	if err != nil {
		return nil, err
	}
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(procs), zstd.WithDecodeAllCapLimit(true),
		zstd.WithDecoderMaxMemory(2*maxChunkSize), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, err
	}
	return &coder{enc, dec}, nil
}

func (c *coder) close() {
	_ = c.enc.Close() // without a stream it has nothing to flush
	c.dec.Close()
}

// compress returns the payload for data and its codec: the compressed bytes in
// dst's memory, or data itself if it does not shrink enough. Chunks get zstd. A
// map node gets S2: it is hashes, which do not shrink, between runs of zeros,
// which any codec takes out.
func (c *coder) compress(dst []byte, id ID, kind recordType, data []byte) ([]byte, codec, error) {
	how := codecS2
	var out []byte
	if kind == nodeRecord {
		out = s2.Encode(dst[:cap(dst)], data)
	} else {
		how = codecZstd
		out = c.enc.EncodeAll(data, dst[:0])
	}
	if len(out) > len(data)-len(data)/minSaving {
		return data, codecNone, nil
	}
	if id[0]%checkEvery == 0 {
		back, err := c.expand(nil, out, how, len(data))
		if err != nil || !bytes.Equal(back, data) {
			return nil, 0, fmt.Errorf("chunk %.16s does not come back from compression; nothing was stored", id)
		}
	}
	return out, how, nil
}

// expand decodes a payload into exactly raw plain bytes, in dst's memory if it is
// large enough. It never allocates more than raw+decodeSlack bytes for them. What is
// behind them in dst's capacity, up to decodeSlack bytes, is undefined afterwards.
func (c *coder) expand(dst, payload []byte, how codec, raw int) ([]byte, error) {
	if raw < 0 || raw > maxChunkSize {
		return nil, fmt.Errorf("payload of %d plain bytes", raw)
	}
	if cap(dst) < raw {
		dst = make([]byte, raw, raw+decodeSlack)
	}
	dst = dst[:raw]
	var out []byte
	var err error
	switch how {
	case codecNone:
		if len(payload) != raw {
			return nil, fmt.Errorf("payload of %d bytes, want %d", len(payload), raw)
		}
		copy(dst, payload)
		return dst, nil
	case codecZstd:
		out, err = c.dec.DecodeAll(payload, dst[:0:min(cap(dst), raw+decodeSlack)])
	case codecS2:
		var n int
		if n, err = s2.DecodedLen(payload); err == nil && n != raw {
			err = errors.New("wrong length")
		}
		if err == nil {
			out, err = s2.Decode(dst, payload)
		}
	default:
		return nil, fmt.Errorf("codec %d is unknown", how)
	}
	if err != nil {
		return nil, fmt.Errorf("decompress: %w", err)
	}
	if len(out) != raw {
		return nil, fmt.Errorf("decompressed to %d bytes, want %d", len(out), raw)
	}
	return out, nil
}
